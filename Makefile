# Each target sets up .venv by itself: a Python of 3.11 or newer (with its venv module) and make are all that is needed.
# `make PYTHON=/path/to/python3.12 test` says which Python; remove .venv to change it later.

SHELL := /bin/bash
PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_BENCH := $(VENV)/.ready-bench
TIDY := --quiet --disable-pip-version-check --no-input

# A name may exist and yet fail when run (version managers' shims do), so each candidate is asked, not just looked up.
CANDIDATES := $(if $(PYTHON),"$(PYTHON)",python3.13 python3.12 python3.11 python3 python)

.PHONY: help demo test test-all test-aarch64 lint bench clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  PYTHON=...        the Python to set .venv up with (default: the first of $(CANDIDATES) that is 3.11 or newer)"

demo: $(READY) ## six networks learn by backpropagation on real data; ends with their scores and the run folders
	@$(BIN)/chainrule demo all

test: lint ## ruff and mypy, then the tests with fixed seeds (minutes)
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

test-all: lint ## everything: the slow tests too, and more and random samples
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m "slow or not slow" --hypothesis-profile=all

test-aarch64: $(READY) ## machine code for AArch64, run by an emulator: needs Debian's qemu-user and binutils-aarch64-linux-gnu (minutes)
	@for tool in qemu-aarch64 aarch64-linux-gnu-as; do command -v $$tool >/dev/null || { \
	  echo "chainrule: no $$tool. On Debian and Ubuntu: apt-get install qemu-user binutils-aarch64-linux-gnu (16 MB)" >&2; exit 1; }; done
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m "slow or not slow" tests/test_aarch64.py

lint: $(READY) ## ruff (style and format) and mypy --strict (seconds)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(READY_BENCH) ## side by side with PyTorch, JAX and scikit-learn: ROWS="xor digits" for some of the networks
	@$(BIN)/python -m bench $(ROWS) --json bench.json $(OPTIONS)

# PyTorch's index of CPU builds (TORCH_INDEX=...): its build on PyPI carries GPU libraries of some GB.
$(READY_BENCH): $(READY)
	@$(BIN)/python -m pip install $(TIDY) -e '.[bench]' $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@touch $@

clean: ## removes .venv and the caches
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an installation that was interrupted is done again.
$(READY): pyproject.toml
	@set -euo pipefail; \
	if [ ! -x $(BIN)/python ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  rm -rf $(VENV); python=; unusable=; \
	  for candidate in $(CANDIDATES); do \
	    "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
	    if "$$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then python="$$candidate"; break; fi; \
	    unusable="$$candidate"; \
	  done; \
	  if [ -z "$$python" ] && [ -n "$$unusable" ]; then \
	    echo "chainrule: $$unusable lacks the venv module. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; \
	  elif [ -z "$$python" ]; then \
	    echo "chainrule: no Python of 3.11 or newer among: "$(CANDIDATES)". Install one, or say make PYTHON=/path/to/python" >&2; exit 1; \
	  fi; \
	  echo "chainrule: setting up $(VENV) with $$("$$python" --version) ..."; \
	  "$$python" -m venv $(VENV); \
	else \
	  echo "chainrule: bringing $(VENV) up to date ..."; \
	fi; \
	$(BIN)/python -m pip install $(TIDY) -e '.[dev]'; \
	touch $(READY)
