"""Libraries made good neighbours: quiet on the user's terminal, no waste of a shared CPU or of a card's memory.

Called before torch is imported, since OpenMP reads its settings then.
"""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Silence warnings, log lines and progress bars of the libraries; errors still raise."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that spin while they wait make every other busy process, and so themselves, several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Rows differ in length from step to step; memory that can grow in place is not lost between blocks of other sizes.
    # Host memory for copies is pinned by several threads, which takes a fraction of the time.
    pinning = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
    os.environ.setdefault("PYTORCH_ALLOC_CONF", f"expandable_segments:True,{pinning}")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    # Models are read from folders; nothing here may wait for a hub that does not answer.
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    for name in ("transformers", "peft", "bitsandbytes", "torch", "torch.distributed", "accelerate", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
