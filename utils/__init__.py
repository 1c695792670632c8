"""Rooms of the house. Imports, here and outside, go down these levels alone, in no circle:

    9  commands
    8  utils/finetune.py
    7  utils/reports
    6  utils/planning, inference
    5  utils/training, utils/results
    4  utils/model, utils/runs
    3  utils/download, utils/rows
    2  utils/files.py, utils/machine, ft_datasets
    1  configs, utils/quiet.py

Commands are the files that people run by name, wherever they lie; nothing imports them. What lies flat in a room does
not import its inner rooms. tests/unit/test_layout.py reads this page and holds it; `make levels` prints it.
"""
