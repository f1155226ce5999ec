# The first use creates .venv and installs into it; later uses reuse it until pyproject.toml or constraints.txt changes.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
CLIENTS := .venv-clients/.installed

ifneq ($(words $(CURDIR)),1)
$(error $(CURDIR): Ray does not start from a path with spaces: use a checkout in one without)
endif

.PHONY: run test test-fast test-faults test-cluster test-browser test-clients test-gpu bench-gpu lint bench clean
.SILENT:

run: $(INSTALLED)
	$(BIN)/gru run pipelines/configs/quickstart.toml $(ARGS)

# Two processes share the files: while one waits for a Ray or an MLflow to start, the other computes.
SIDE_BY_SIDE := --numprocesses 2 --no-loadscope-reorder

test: $(INSTALLED)
	$(BIN)/python -m pytest $(if $(ARGS),$(ARGS),$(SIDE_BY_SIDE))

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not (services or slow or chaos or cluster or faults or browser or clients or gpu)' $(ARGS)

test-faults: $(INSTALLED)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'faults and not chaos' $(ARGS)

test-cluster: $(INSTALLED)
	$(BIN)/python -m pytest -m cluster -rP $(ARGS)

test-browser: $(INSTALLED)
	$(BIN)/python -m pytest -m browser $(ARGS)

test-clients: $(CLIENTS)
	$(BIN)/python -m pytest -m clients $(ARGS)

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
	rm -rf .venv .venv-clients *.egg-info .mypy_cache .pytest_cache .ruff_cache

KNOWN := $(foreach minor,11 12 13 14 11,python3.$(minor))
define FIND_PYTHON
if ! command -v $(PYTHON) >/dev/null; then found="there is no $(PYTHON)"; \
elif ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then found="$(PYTHON) is $$($(PYTHON) --version 2>&1)"; \
else exit 0; fi; \
for each in $(KNOWN); do if command -v $$each >/dev/null; then break; fi; done; \
echo "error: Python 3.11 or newer is needed, and $$found: make PYTHON=$$each $(MAKECMDGOALS)" >&2; exit 2
endef

$(INSTALLED): pyproject.toml constraints.txt
	$(FIND_PYTHON)
	$(PYTHON) -I gru/preflight.py .venv
	echo "installing into .venv (a few minutes, once)" >&2
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --editable '.[dev]' >&2
	touch $@

# Clients are programs of other people, whose requirements are not ours. What both need, such as torch, is .venv's.
PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))
$(CLIENTS): $(INSTALLED) tests/gru/serving/clients/requirements.txt
	echo "installing clients into .venv-clients (a few minutes, once)" >&2
	$(PYTHON) -m venv .venv-clients
	$(BIN)/python -c '$(PACKAGES)' >"$$(.venv-clients/bin/python -c '$(PACKAGES)')/project.pth"
	.venv-clients/bin/python -m pip install --quiet --quiet --no-warn-conflicts \
		--requirement tests/gru/serving/clients/requirements.txt >&2
	npm install --silent --no-audit --no-fund --prefix .venv-clients openai@6.49.0 >&2
	touch $@
