# `make train` runs the main job and `make test` the tests, each from nothing but Python 3.10 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Its defaults, which accelerate would list on every start.
ONE := --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: train test

train: $(VENV)/.installed
	$(BIN)/accelerate launch $(ONE) examples/train.py

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

$(VENV)/.installed: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints-cpu.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints-cpu.txt -e '.[dev]'
	touch $@
