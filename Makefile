# make train   runs the main recipe on this machine      make test   runs all tests
# make check   lint, and the tests without processes     make lint   style, layers, types
# make docs    builds the documentation into site/
# All build a virtual environment first (make venv): .venv, or $FP16RL_VENV. Repeated calls skip it.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help venv train test check docs lint check-pins clean-venv

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := $(abspath $(or $(FP16RL_VENV),.venv))
RECIPE ?= recipes/tiny/dense-grpo-fp16.yaml
ARGS ?=

# The stamp's name holds what the environment was made of: it is remade when that changes.
STAMP := $(VENV)/.made-$(shell cat requirements-cpu.txt pyproject.toml <(pwd) | sha256sum | cut -c1-16)
# The CPU build of torch has an index of its own; where that is out of reach, pip's usual index is
# asked, which gives a CPU build if it holds one. The import below says so if it does not.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PIP := $(VENV)/bin/python -m pip --quiet --disable-pip-version-check

help:
	@sed -n '1,4s/^# //p' Makefile

venv: $(STAMP)

train: $(STAMP)
	$(VENV)/bin/fp16rl train $(RECIPE) $(ARGS)

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: lint
	$(VENV)/bin/python -m pytest -n 2 tests/unit $(ARGS)

# A dead link or anchor is an error. To look at it: python -m http.server -d site (from the disk it has no search).
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

lint: $(STAMP)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/mypy

# Whether pip can resolve the GPU cluster's pins. Nothing is installed, but pip may download wheels
# (5 GB) to read what they require. transformer-engine-torch cannot be asked without a CUDA torch, nor
# megatron-core on Python 3.11, so what they require is given in their place.
check-pins: $(STAMP)
	grep -vE "^(transformer-engine-torch|megatron-core)=" requirements.txt > $(VENV)/check-pins.txt
	$(VENV)/bin/python -m pip install --dry-run --ignore-installed --prefer-binary -r $(VENV)/check-pins.txt einops onnx onnxscript nvdlfw-inspect 'nvidia-cudnn-frontend>=1.25.0' numpy packaging

clean-venv:
	rm -rf $(VENV)

$(STAMP):
	@[ -n "$(PYTHON)" ] && $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	  || { echo "error: Python 3.11 or 3.12 is needed ($(or $(PYTHON),none) was found); install it or say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "error: $(PYTHON) has no venv module; install it, e.g. apt-get install python3-venv" >&2; exit 1; }
	@echo "building $(VENV): about 3 minutes, 4 GB"
	@rm -f $(VENV)/.made-*
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --no-deps --retries 0 --timeout 15 --index-url $(TORCH_INDEX) $$(grep ^torch== requirements-cpu.txt) 2>/dev/null \
	  || $(PIP) install --no-deps $$(grep ^torch== requirements-cpu.txt)
	@# Megatron-core has wheels for Python 3.12 alone, and builds on 3.11: without a C++ compiler it leaves out what
	@# only its data sets use.
	@$(PIP) install --no-deps $$(grep -E '^(setuptools|pybind11)==' requirements-cpu.txt)
	@$(PIP) install --no-deps --no-build-isolation --ignore-requires-python $$(grep ^megatron-core== requirements-cpu.txt)
	@$(PIP) install --no-deps -r requirements-cpu.txt
	@$(PIP) install --no-deps --no-build-isolation -e .
	@$(VENV)/bin/python -c 'import torch' 2>/dev/null \
	  || { echo "error: torch in $(VENV) does not import: probably a CUDA build; say make TORCH_INDEX=<an index with CPU builds>" >&2; exit 1; }
	@touch $@
