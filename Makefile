# make pretrain   a virtual environment, pinned packages, and a first training (the `demo` recipe)
# make test       the same environment with the developer's packages, and all tests
# make lint       ruff and pyright
#
# Beforehand: Python 3.11, 3.12 or 3.13, make, a network. Variables:
#   ARGS="beit-base-in1k --data DIR"   what `make pretrain` trains instead of the demo, or pytest's
#   PYTHON=/path/to/python3.12         the interpreter for a new environment (default: the first fit)
#   VENV=.venv                         where the environment lies
#   GPU_EXTRA=cuda12                   DALI for a driver of CUDA 12 (default: gpu, CUDA 13)
# pip's own configuration applies: to take a build of torch from elsewhere, set pip up for it first.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help pretrain test lint format setup setup-dev doctor clean-venv

VENV ?= .venv
PYTHON ?=
ARGS ?=
GPU_EXTRA ?= gpu

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PINS := setup.py constraints.txt Makefile
# GPU extras only where a driver is found; torch itself brings the CUDA libraries and Triton.
NVIDIA_DRIVER := $(shell [ -e /proc/driver/nvidia/version ] && echo yes || { nvidia-smi -L >/dev/null 2>&1 && echo yes; } || true)
RUN_EXTRAS := $(if $(NVIDIA_DRIVER),[$(GPU_EXTRA)],)

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

pretrain: $(VENV)/.installed
	$(BIN)/torchrun --standalone -m fastbeit.pretrain $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

doctor: $(VENV)/.installed
	$(BIN)/python -m fastbeit.doctor $(ARGS)

setup: $(VENV)/.installed

setup-dev: $(VENV)/.installed-dev

clean-venv:
	rm -rf "$(VENV)"

# A stamp is written when its step has ended well, so an interrupted set-up starts where it was.
$(VENV)/.created:
	@chosen=""; seen=""; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11); do \
	  version=$$("$$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	  seen="$$seen $$candidate ($$version)"; \
	  case "$$version" in 3.11|3.12|3.13) chosen="$$candidate"; break;; esac; \
	done; \
	if [ -z "$$chosen" ]; then \
	  echo "fastbeit needs Python 3.11, 3.12 or 3.13; found:$${seen:- none}." >&2; \
	  echo "Install one of them, then: make PYTHON=/path/to/python3.12 ..." >&2; \
	  exit 1; \
	fi; \
	echo "Making $(VENV) with $$chosen"; \
	if ! "$$chosen" -m venv "$(VENV)"; then \
	  echo "$$chosen has no working venv module; on Debian and Ubuntu it is the package python3-venv." >&2; \
	  exit 1; \
	fi
	@touch $@

# torch first and alone: whatever comes later finds it there and can't bring a second one along.
$(VENV)/.torch: $(VENV)/.created constraints.txt
	@echo "Installing torch"
	@$(PIP) setuptools torch
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(PINS)
	@echo "Installing fastbeit$(RUN_EXTRAS)"
	@$(PIP) --no-build-isolation -e ".$(RUN_EXTRAS)"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing fastbeit[dev]"
	@$(PIP) --no-build-isolation -e ".[dev]"
	@touch $@
