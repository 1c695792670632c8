# make quickstart   the whole path on a tiny model, in minutes, without a GPU
# make test         the test suite
# make test-all     the same, and what asks other programs (llama.cpp reads GGUF files back)
# make soak         long fault and parity tests (an hour or two)
# make lint         ruff
# make levels       who may import whom, and whether it is so
#
# Behind a slow line give a package mirror: make quickstart PIP_INDEX=https://pypi.tuna.tsinghua.edu.cn/simple

PYTHON ?= python3
PIP_INDEX ?=
TORCH ?= 2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INDEX := $(if $(PIP_INDEX),--index-url $(PIP_INDEX))

.PHONY: quickstart test test-all soak lint levels catalogue venv

quickstart: $(VENV)/.installed
	@$(BIN)/python -u scripts/quickstart.py

test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest

test-all: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -m "slow or not slow"

soak: $(VENV)/.installed-dev
	@$(BIN)/python tests/soak_parity.py
	@$(BIN)/python tests/soak_resume.py
	@$(BIN)/python tests/soak_download.py

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

levels: $(VENV)/.installed-dev
	@$(BIN)/python tests/unit/test_layout.py

catalogue: $(VENV)/.installed-dev
	@$(BIN)/python -m scripts.catalogue

venv: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "Python 3.11, 3.12 or 3.13 is needed, $$($(PYTHON) --version) was found: make PYTHON=python3.12 …"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "On Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	@$(MAKE) --no-print-directory torch
	@echo "Installing the other libraries …"
	@$(PIP) install -q $(INDEX) -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	@echo "Installing what the tests need …"
	@$(PIP) install -q $(INDEX) -r requirements-dev.txt
	@touch $@

# A machine without an NVIDIA GPU gets the CPU build (200 MB instead of gigabytes), from PyTorch's own index where that
# answers within seconds.
.PHONY: torch
torch:
	@if $(BIN)/python -c 'from importlib.metadata import version; exit(version("torch").split("+")[0] != "$(TORCH)")' 2>/dev/null; then \
	  echo "torch $(TORCH) is there."; \
	elif nvidia-smi -L >/dev/null 2>&1; then \
	  echo "NVIDIA GPU found: installing torch $(TORCH) with CUDA (about 3 GB) …"; \
	  $(PIP) install -q $(INDEX) torch==$(TORCH); \
	elif $(BIN)/python scripts/host_answers.py $(TORCH_CPU_INDEX) && \
	  echo "No NVIDIA GPU: installing torch $(TORCH) for the CPU …" && \
	  $(PIP) install -q --timeout 20 --retries 1 --index-url $(TORCH_CPU_INDEX) torch==$(TORCH); then :; \
	else \
	  echo "No NVIDIA GPU, and $(TORCH_CPU_INDEX) does not answer: installing torch $(TORCH) from the package index …"; \
	  $(PIP) install -q $(INDEX) torch==$(TORCH); \
	fi
