# The first use creates .venv and installs into it; later uses reuse it until pyproject.toml or constraints.txt changes.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: run test test-fast test-faults test-cluster test-browser lint bench clean
.SILENT:

run: $(INSTALLED)
	$(BIN)/gru run pipelines/configs/quickstart.toml $(ARGS)

# Two processes: while one waits for a Ray, an MLflow or a Postgres to start, the other computes.
SIDE_BY_SIDE := --numprocesses 2 --no-loadscope-reorder

test: $(INSTALLED)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not (services or chaos or cluster or faults or browser)' $(ARGS)

test-faults: $(INSTALLED)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'faults and not chaos' $(ARGS)

test-cluster: $(INSTALLED)
	$(BIN)/python -m pytest -m cluster -rP $(ARGS)

test-browser: $(INSTALLED)
	$(BIN)/python -m pytest -m browser $(ARGS)

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
