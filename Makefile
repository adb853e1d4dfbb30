# Everything runs from .venv, which the first target makes. PYTHON=... names the Python to use.
.PHONY: train test test-full test-oldest setup lint format constraints clean
.DEFAULT_GOAL := help

BIN := .venv/bin
RUN := runs/quickstart
# Each xdist worker gets one core; the compile cache in .cache/jax is set up by tests/conftest.py.
PYTEST := -m pytest -n 2 --dist loadfile --durations=20

help:
	@echo "make train        train the quickstart model on a CPU, evaluate it and sample from it"
	@echo "make test         the tests, without those marked slow"
	@echo "make test-full    all tests"
	@echo "make test-oldest  the tests on the oldest jax that is supported"
	@echo "make setup        only make .venv and install"
	@echo "make lint         ruff and mypy"

train: .venv/.ready
	$(BIN)/effattn train --config=quickstart --workdir=$(RUN)
	$(BIN)/effattn evaluate --workdir=$(RUN) --baselines
	$(BIN)/effattn generate --workdir=$(RUN) --prompt="def " --max_new_tokens=240 --temperature=0.7

test: .venv/.ready
	$(BIN)/python $(PYTEST) -m "not slow"

test-full: .venv/.ready
	$(BIN)/python $(PYTEST)

test-oldest: .venv/oldest/.ready
	.venv/oldest/bin/python $(PYTEST) -m "not slow"

setup: .venv/.ready

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: .venv/.ready
	$(BIN)/uv pip compile -q --upgrade --no-header --no-annotate --no-emit-index-url \
	  --no-emit-find-links --python-version 3.12 --extra dev pyproject.toml -o constraints.txt

clean:
	rm -rf .venv .cache build dist *.egg-info

.venv/.ready: pyproject.toml constraints.txt scripts/setup.sh
	@scripts/setup.sh .venv
	@touch $@

.venv/oldest/.ready: .venv/.ready
	@scripts/setup.sh .venv/oldest jax==0.11.2 jaxlib==0.11.2
	@touch $@
