# make serve    serve two small models on http://127.0.0.1:8000; needs only python3 and make
# make test     run the test suite                   make check    check lint, format and types
# make setup    create .venv for `test` and `check`  make format   format the code with ruff
# make bench    measure tokens/s and GB/s of decoding
# make docs     build the documentation in build/site; docs-serve serves it on port 8001
# make docs-commands    run the commands of README and docs, compare the outputs that they show
# make clean    remove generated files
# make aot VENV=.venv-aot    compile kernels and steps for TPUs and GPUs that are not present
# make ray      install Ray and run its tests on this machine
#
# PYTHON=python3.12 and VENV=.venv312 choose another Python and folder, PIP_ARGS="jax==0.11.1" pins
# packages. HOST and PORT are for `serve`, PYTEST_ARGS for `test` (PYTEST_ARGS="tests/muxjax -k config").

VENV ?= .venv
PYTHON ?=
HOST ?= 127.0.0.1
PORT ?= 8000
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2
BENCH_ARGS ?=
PAGES ?=

BIN := $(VENV)/bin
# Stamp files of installed dependencies. `make serve` needs only those of the run time, so that it is
# quick on a new machine.
RUN := $(VENV)/.installed-run
DEV := $(VENV)/.installed-dev
AOT := $(VENV)/.installed-aot
RAY := $(VENV)/.installed-ray
DOCS := $(VENV)/.installed-docs

.DEFAULT_GOAL := help
.PHONY: help setup serve test aot ray check lint types format bench docs docs-commands docs-serve clean FORCE

help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

setup: $(DEV)
	@echo "muxjax is installed as $(BIN)/muxjax; to call it by its name: source $(BIN)/activate"

$(BIN)/python:
	@python=$$(scripts/find-python $(PYTHON)) && echo "creating $(VENV) with $$python" && "$$python" -m venv $(VENV)

$(RUN): pyproject.toml scripts/pip-install | $(BIN)/python
	@echo "installing muxjax and its run-time dependencies"
	@scripts/pip-install $(VENV) -e . $(PIP_ARGS)
	@touch $@

$(DEV): pyproject.toml scripts/pip-install | $(BIN)/python
	@echo "installing muxjax and the dependencies of its tests and checks"
	@scripts/pip-install $(VENV) -e '.[dev]' $(PIP_ARGS)
	@touch $(RUN) $@

$(AOT): pyproject.toml scripts/pip-install | $(BIN)/python
	@echo "installing muxjax, its test dependencies, and the compilers for TPUs and GPUs"
	@scripts/pip-install $(VENV) -e '.[dev,tpu,aot-cuda]' $(PIP_ARGS)
	@touch $(RUN) $(DEV) $@

$(RAY): pyproject.toml scripts/pip-install | $(BIN)/python
	@echo "installing muxjax, its test dependencies, and Ray"
	@scripts/pip-install $(VENV) -e '.[dev,ray]' $(PIP_ARGS)
	@touch $(RUN) $(DEV) $@

$(DOCS): pyproject.toml scripts/pip-install | $(BIN)/python
	@echo "installing muxjax and the dependencies of its documentation"
	@scripts/pip-install $(VENV) -e '.[docs]'
	@touch $(RUN) $@

serve: $(RUN)
	@$(BIN)/muxjax fetch smollm2-135m gemma3-270m
	@exec $(BIN)/muxjax serve examples/demo.yaml --host $(HOST) --port $(PORT)

test: $(DEV)
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

# Use a separate environment (VENV=.venv-aot): JAX searches for a TPU if libtpu is installed.
aot: $(AOT)
	@$(BIN)/python -m pytest -s -m "aot_tpu or aot_cuda" $(PYTEST_ARGS) -n 0

ray: $(RAY)
	@$(BIN)/python -m pytest -s -m ray $(PYTEST_ARGS) -n 0

check: lint types

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)
	$(BIN)/python -m mypy -p muxjax
	$(BIN)/python -m mypy benchmarks/*.py

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(RUN)
	$(BIN)/python benchmarks/decode.py $(BENCH_ARGS)

# The options of every command, which docs/reference/command-line.md includes.
build/command-line.md: $(DOCS) FORCE
	@mkdir -p build
	@$(BIN)/python scripts/command_line_page.py > $@.new && mv $@.new $@

# The variable silences Material's notice about MkDocs 2, which pyproject.toml excludes.
docs: build/command-line.md
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Pages are paths: make docs-commands PAGES="README.md docs/guides/serving.md". All take minutes.
docs-commands: $(DEV)
	@$(BIN)/python -m tests.docs $(PAGES)

docs-serve: build/command-line.md
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --dev-addr 127.0.0.1:8001

FORCE:

clean:
	rm -rf .venv .venv312 build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
