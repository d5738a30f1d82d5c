# make run     install once, then start the studio          make test      install for tests, then run them
# make test-all  the slow tests too                         make check     format, lint, types, unit tests
# make bench   speed of the engine                          make catalog   regenerate assets/catalog.json
# make screenshots  take the pictures of the README from the running studio
#
# PYTHON=python3.12 make run   chooses the interpreter (3.11 or newer).  ARGS="--port 8080" is handed on to the studio.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := run
.DELETE_ON_ERROR:

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ARGS ?=
TESTS ?= tests
# Two processes, a test file as a whole in one of them; one thread each, so that two cores are enough.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
# Seconds that the download of Chromium may take before the system's package is tried.
BROWSER_TIMEOUT ?= 120

.PHONY: run test test-all check bench catalog screenshots browser clean

run: $(VENV)/.installed $(VENV)/.demo-model
	$(BIN)/pareto-studio $(ARGS)

test: $(VENV)/.installed-dev browser
	$(PYTEST) -m "not slow" $(TESTS)

test-all: $(VENV)/.installed-dev browser
	$(PYTEST) $(TESTS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow" tests/unit

bench: $(VENV)/.installed
	$(BIN)/python -m workers.bench $(ARGS)

# The old file stays in place until the new one is complete.
catalog: $(VENV)/.installed
	$(BIN)/python -m workers describe > assets/catalog.json.part || { rm -f assets/catalog.json.part; exit 1; }
	mv assets/catalog.json.part assets/catalog.json

# A race of SmolLM2 in the real page; on a quiet machine the numbers in the pictures mean something.
screenshots: $(VENV)/.installed-dev browser
	$(BIN)/python -m tests.ui.screenshots

# Nothing to do where a Chromium is there; else Playwright's own, else Debian's, else say what to do.
browser: $(VENV)/.installed-dev
	@$(BIN)/python tests/browser.py > /dev/null 2>&1 || $(BIN)/python tests/browser.py --install --timeout $(BROWSER_TIMEOUT)

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and was not found; install it, or name it: PYTHON=/path/to/python3.11 make" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11; name another: PYTHON=/path/to/python3.11 make" >&2; exit 1; }
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --editable .
	@touch $@

# So that the studio works offline from here on; without a network now, it is fetched on first use.
$(VENV)/.demo-model: | $(VENV)/.installed
	@if $(BIN)/pareto-studio zoo fetch smollm2-135m; then touch $@; else echo "going on without the demo model" >&2; fi

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --editable '.[dev]'
	@touch $(VENV)/.installed $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache test-results
