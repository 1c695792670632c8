"""Rooms of the house. Imports, here and outside, go down these levels alone, in no circle:

   10  commands
    9  utils/finetune.py
    8  utils/reports
    7  utils/planning, inference
    6  utils/training, utils/results
    5  utils/model, utils/runs
    4  utils/download, utils/rows
    3  utils/machine, ft_datasets
    2  utils/files.py
    1  configs, utils/quiet.py

Commands are the files that people run by name, wherever they lie; nothing imports them. What lies flat in a room does
not import its inner rooms. tests/unit/test_layout.py reads this page and holds it; `make levels` prints it.
"""
