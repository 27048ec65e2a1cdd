# `make demo` and `make test` do everything on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Real task data for tests, when a sibling checkout provides it; tests that need it skip otherwise.
export UNMASK_DATA ?= $(if $(wildcard ../shared/data),$(abspath ../shared/data),)

.PHONY: setup demo test test-all test-oldest lint clean
setup: $(VENV)/.ready

# A torch that the chosen Python already has (a CUDA build, say) is used as it is.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "unmask needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3"; exit 2; }
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
		$(PYTHON) -m venv --system-site-packages $(VENV) && grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt; \
	else \
		$(PYTHON) -m venv $(VENV) && cp constraints.txt $(VENV)/constraints.txt && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"; \
	fi || { echo "setting up $(VENV) failed; on Debian install python3-venv, then run make again"; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/unmask train recipes/sudoku-espo.toml

test: setup
	@$(BIN)/python -m pytest -n auto --maxprocesses 4

test-all: setup test-oldest $(VENV)/.lm-eval
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 -m 'not gpu'

# The evaluation harness brings some fifty packages, so `make test` does without.
$(VENV)/.lm-eval: $(VENV)/.ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[lm-eval]'
	@touch $@

# The model families on the oldest transformers that pyproject.toml allows, laid over the packages of the environment.
OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)

test-oldest: $(VENV)/oldest-$(OLDEST)/.ready
	@PYTHONPATH=$(abspath $(<D)) $(BIN)/python -c 'import transformers; v = transformers.__version__; print("transformers", v); assert v.startswith("$(OLDEST).")'
	@PYTHONPATH=$(abspath $(<D)) $(BIN)/python -m pytest tests/test_families.py

$(VENV)/oldest-$(OLDEST)/.ready: | setup
	@rm -rf $(@D) && $(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(@D) transformers==$(OLDEST).0
	@touch $@

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf $(VENV) build dist src/*.egg-info
