# Everything here sets up what it needs in .venv; set PYTHON to choose the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch comes first and alone, so that no other package's requirement picks another build of it.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint bench clean

demo: $(VENV)/.ready
	$(BIN)/python -m examples.demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n auto --cov=sparsight --cov-fail-under=90

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.core --output bench/results/core-cpu-1-thread.json
	OMP_NUM_THREADS=2 $(BIN)/python -m bench.core --output bench/results/core-cpu-2-threads.json

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV)
