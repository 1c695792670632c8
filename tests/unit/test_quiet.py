"""Libraries are quiet within, and the process is afterwards as it was."""

import logging
import os
import warnings

import huggingface_hub
import pytest
import torch

from utils.quiet import quiet_libraries


@pytest.mark.parametrize("how", ["returns", "raises"])
def test_all_is_as_it_was_whether_the_block_returns_or_raises(monkeypatch, how):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    logger, other = logging.getLogger("transformers"), logging.getLogger("of the user")
    monkeypatch.setattr(logger, "level", logging.DEBUG)
    monkeypatch.setattr(other, "level", logging.INFO)
    torch.backends.cuda.enable_cudnn_sdp(True)
    environment, filters = dict(os.environ), list(warnings.filters)

    def within() -> None:
        with quiet_libraries():
            assert (os.environ["TRANSFORMERS_VERBOSITY"], os.environ["TOKENIZERS_PARALLELISM"]) == ("error", "true")
            assert (os.environ["OMP_WAIT_POLICY"], os.environ["HF_HUB_OFFLINE"]) == ("PASSIVE", "1")
            assert huggingface_hub.constants.HF_HUB_OFFLINE
            assert logger.level == logging.ERROR
            with warnings.catch_warnings(record=True) as heard:
                warnings.warn("something", stacklevel=1)
            assert heard == []
            os.environ["SET_BY_A_LIBRARY"] = "1"
            del os.environ["TOKENIZERS_PARALLELISM"]
            other.setLevel(logging.CRITICAL)
            torch.backends.cuda.enable_cudnn_sdp(False)
            if how == "raises":
                raise ValueError

    if how == "raises":
        with pytest.raises(ValueError):
            within()
    else:
        within()
    assert dict(os.environ) == environment
    assert list(warnings.filters) == filters
    assert (logger.level, other.level) == (logging.DEBUG, logging.INFO)
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert torch.backends.cuda.cudnn_sdp_enabled()
