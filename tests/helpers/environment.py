"""What this process and those that tests start are told: English, and one quiet thread.

To be imported before torch, which reads its settings then, and before configs.messages, which chooses a language.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

os.environ |= {"LANGUAGE": "", "LC_ALL": "C.UTF-8"}
# Threads that spin while they wait slow down every other process on few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "LANGUAGE": "",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONUNBUFFERED": "1",
}
"""Of the processes that tests start."""
