# Everything here sets itself up: a target that needs the tools makes $(VENV) first, and installs into it again
# only when pyproject.toml, the constraints or the version have changed. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
CONFIG ?=
ARGS ?=

SHELL := /bin/sh
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TYPING := build/typing/segkd
run_file = $(if $(CONFIG),--config '$(CONFIG)')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo teacher-cache train-student test check bench clean python-as-named run-file-is-named

help: ## say what can be made
	@echo 'make TARGET [CONFIG=run.toml] [ARGS="--set train.steps=500"] [PYTHON=python3.12] [VENV=.venv]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## install segkd, editable, with its development tools

demo: $(STAMP) ## both stages and the comparison on built-in scenes; nothing to download
	@# Threads that wait must not spin: on a busy machine that costs a step ten times its work.
	OMP_WAIT_POLICY=passive $(BIN)/python examples/demo.py $(run_file) $(ARGS)

teacher-cache: run-file-is-named $(STAMP) ## stage 1: the teacher looks at every image of CONFIG, once
	$(BIN)/segkd teacher-cache $(run_file) $(ARGS)

train-student: run-file-is-named $(STAMP) ## stage 2: train CONFIG's student from the cache
	$(BIN)/segkd train-student $(run_file) $(ARGS)

test: $(STAMP) ## the whole test suite; ARGS go to pytest
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --durations=10 $(ARGS)

check: $(STAMP) ## lint, format, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@# mypy does not see packages that pyproject.toml maps to other folders; it sees links.
	@mkdir -p $(TYPING)
	@cd $(TYPING) && ln -sfn ../../../storage ../../../pipeline ../../../cli ../../../packaging/segkd/* .
	$(BIN)/mypy --strict -p segkd
	$(BIN)/mypy --strict $(wildcard benchmarks/*.py examples/*.py)

bench: $(STAMP) ## measure speed and size on this machine
	$(BIN)/python benchmarks/run.py $(run_file) $(ARGS)

clean: ## remove what was built or measured; $(VENV) and runs/ stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find cli pipeline storage packaging tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

# The stamp is written last, so a failed or interrupted installation is taken up again by the next `make`.
$(STAMP): pyproject.toml constraints.txt packaging/segkd/__init__.py | python-as-named
	sh packaging/install.sh '$(PYTHON)' '$(VENV)'
	@touch $@

# An environment keeps the Python that made it; asking for another one is refused rather than ignored.
python-as-named:
ifneq ($(origin PYTHON),file)
	@test ! -e $(BIN)/python || test "$$('$(PYTHON)' -V 2>&1)" = "$$($(BIN)/python -V 2>&1)" || { \
	  echo "segkd: $(VENV) has $$($(BIN)/python -V 2>&1), not '$(PYTHON)'; remove it, or name another: make VENV=.venv-other" >&2; \
	  exit 1; }
endif

run-file-is-named:
	@test -n '$(CONFIG)' || { echo "segkd: which run file? For instance: make $(MAKECMDGOALS) CONFIG=$(firstword $(wildcard configs/*.toml) run.toml)" >&2; exit 1; }
