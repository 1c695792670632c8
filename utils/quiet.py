"""Libraries made good neighbours: quiet on the user's terminal, no waste of a shared CPU or of a card's memory.

Entered before torch is imported, since OpenMP reads its settings then.
"""

import contextlib
import contextvars
import logging
import os
import sys
import warnings
from collections.abc import Iterator

# Host memory for copies is pinned by several threads, which takes a fraction of the time.
PINNING = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
DEFAULTS = {
    "TOKENIZERS_PARALLELISM": "false",
    # Threads that spin while they wait make every other busy process, and so themselves, several times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Rows differ in length from step to step; memory that can grow in place is not lost between blocks of other sizes.
    "PYTORCH_ALLOC_CONF": f"expandable_segments:True,{PINNING}",
}
"""Environment variables that the user's own go before."""
SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # Models are read from folders; nothing here may wait for a hub that does not answer.
    "HF_HUB_OFFLINE": "1",
}
LOGGERS = ("transformers", "peft", "bitsandbytes", "torch", "torch.distributed", "accelerate", "matplotlib")

_offline_by_user: contextvars.ContextVar[bool | None] = contextvars.ContextVar("offline_by_user", default=None)
"""Whether hubs were switched off before quiet_libraries was entered; None = it was not entered."""


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence warnings, log lines and progress bars of the libraries; errors still raise.

    On leaving, the process is as it was: its environment, warnings filters, logging levels and torch's switches. What a
    library has read when it was imported (OpenMP's settings, the allocator's, whether it shows bars) stays.
    """
    from huggingface_hub import constants  # the library reads the environment but once

    offline = constants.HF_HUB_OFFLINE
    environment = dict(os.environ)
    loggers = [logging.getLogger(name) for name in (None, *LOGGERS, *logging.root.manager.loggerDict)]
    levels = [logger.level for logger in loggers]
    cudnn = sys.modules["torch"].backends.cuda.cudnn_sdp_enabled() if "torch" in sys.modules else True
    os.environ |= DEFAULTS | environment | SETTINGS
    constants.HF_HUB_OFFLINE = True
    token = _offline_by_user.set(offline)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        _offline_by_user.reset(token)
        for name in os.environ.keys() - environment.keys():  # torch's compiler sets some of its own too
            del os.environ[name]
        os.environ |= environment
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if "torch" in sys.modules:  # utils/model/attention.py turns this kernel off
            sys.modules["torch"].backends.cuda.enable_cudnn_sdp(cudnn)


@contextlib.contextmanager
def hubs_allowed() -> Iterator[None]:
    """Within quiet_libraries, let a download ask hubs, unless the user has switched them off."""
    from huggingface_hub import constants

    by_user, now = _offline_by_user.get(), constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = now if by_user is None else by_user
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = now
