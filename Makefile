# Everything here sets up what it needs in .venv; set PYTHON to choose the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch comes first and alone, so that no other package's requirement picks another build of it.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint bench train eval-model clean

demo: $(VENV)/.ready
	$(BIN)/sparsight generate --image examples/receipt-1.png --prompt "Find LI on the page." --compare
	$(BIN)/sparsight inspect --image examples/receipt-1.png --prompt "Find LI on the page." --output demo.png

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n auto --cov=sparsight --cov-fail-under=90

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready
	$(BIN)/python -m bench.core --threads 1 --rounds 12 --output bench/results/core-cpu-1-thread.json
	$(BIN)/python -m bench.core --threads 2 --rounds 8 --output bench/results/core-cpu-2-threads.json

# glibc is told to keep large blocks: a training step frees and takes hundreds of them.
train: export MALLOC_MMAP_THRESHOLD_ = 4000000000
train: export MALLOC_TRIM_THRESHOLD_ = 8000000000
train: $(VENV)/.ready
	$(BIN)/python -m training.train

eval-model: $(VENV)/.ready
	$(BIN)/python -m training.evaluate

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV)
