# The first use creates .venv and installs into it; later uses reuse it until pyproject.toml or constraints.txt changes.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

ifneq ($(words $(CURDIR)),1)
$(error $(CURDIR): Ray does not start from a path with spaces: use a checkout in one without)
endif

.PHONY: run test test-fast test-faults test-cluster test-browser test-gpu bench-gpu lint bench clean
.SILENT:

run: $(INSTALLED)
	$(BIN)/gru run pipelines/configs/quickstart.toml $(ARGS)

# Two processes share the files: while one waits for a Ray or an MLflow to start, the other computes.
SIDE_BY_SIDE := --numprocesses 2 --dist loadfile

# The pipeline's tests run alone: they start services and trainings of their own, and time their kills.
test: $(INSTALLED)
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --ignore=tests/pipelines
	$(BIN)/python -m pytest tests/pipelines
endif

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not (services or chaos or cluster or faults or browser or gpu)' $(ARGS)

test-faults: $(INSTALLED)
	$(BIN)/python -m pytest -m 'faults and not chaos' $(ARGS)

test-cluster: $(INSTALLED)
	$(BIN)/python -m pytest -m cluster -rP $(ARGS)

test-browser: $(INSTALLED)
	$(BIN)/python -m pytest -m browser $(ARGS)

# These need only torch, numpy, pydantic, safetensors and pytest: on a machine without .venv, those of PYTHON.
GPU_PYTHON := $(if $(wildcard $(INSTALLED)),$(BIN)/python,$(PYTHON))

test-gpu:
	$(GPU_PYTHON) -m pytest -m gpu tests/gpu $(ARGS)

bench-gpu:
	$(GPU_PYTHON) -m tests.benchmarks.gpu

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --editable '.[dev,bench]' >&2
	$(BIN)/python -m tests.benchmarks.encoding
	$(BIN)/python -m tests.benchmarks.prepare
	$(BIN)/python -m tests.benchmarks.model
	$(BIN)/python -m tests.benchmarks.training
	$(BIN)/python -m tests.benchmarks.serving

clean:
	rm -rf .venv *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(INSTALLED): pyproject.toml constraints.txt
	echo "installing into .venv (a few minutes, once)" >&2
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --editable '.[dev]' >&2
	touch $@
