# `make train` runs the main job and `make test` the tests, each from nothing but Python 3.10 or newer. `make test-slow`
# repeats tests on more engines, models and kills. `make test-vllm` holds the served paths against a real vLLM on the
# CPU, which needs 3.11 and an environment of its own.
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
BIN := $(VENV)/bin
# An older pip, such as comes with Python, takes twice as long. pip would compile all that it installs, on one core,
# which takes as long as to install it. Python compiles what `make train` imports when it does; for the processes of
# the tests, all cores compile most of it once.
PIP := $(BIN)/pip install -q --no-compile -c constraints-cpu.txt
# Packages of which most is never imported.
RARE := transformers/models|/tests?/|/torch/testing|/(pip|setuptools|fontTools|pygments)/
# Its defaults, which accelerate would list on every start, and a second thread.
ONE := --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 2
# In the order of the files: pytest-xdist would leave those of few tests, which are the launches, for the end.
XDIST := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Where it is set, every process would compile again what is imported.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test test-slow test-vllm

train: $(VENV)/.installed
	$(BIN)/accelerate launch $(ONE) examples/train.py

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest $(XDIST) -m "not slow"

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(XDIST) -m slow

test-vllm: $(VENV)/.installed-dev $(VLLM_VENV)/.installed
	VLLM_VENV=$(abspath $(VLLM_VENV)) $(BIN)/python -m pytest tests/real_vllm/test_real_vllm.py

$(VLLM_VENV)/.installed: tests/real_vllm/setup.sh
	PYTHON=$(PYTHON) bash tests/real_vllm/setup.sh $(VLLM_VENV)
	touch $@

$(VENV)/.installed: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv --upgrade-deps $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv --upgrade-deps $(VENV)
	$(PIP) -e '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 -x '$(RARE)' $(VENV)/lib || true
	touch $(VENV)/.installed $@
