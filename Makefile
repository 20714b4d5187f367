# Everything is installed into .venv, which is made on first use; nothing else on the machine is touched.
#
#   PYTHON=python3.12   the interpreter that .venv is made with
#   VENV=.venv-3.12     another place for it, to have several side by side
#   PORT=4041           where `make run` listens
#   ARGS="-k close"     passed on to pytest, or to benchmarks/run.py

PYTHON ?= python3
VENV ?= .venv
PORT ?= 4040
ARGS ?=

HERE := $(VENV)/bin/python
OLDEST := $(VENV)-oldest
GEVENT_OLDEST := 24.10.1
METADATA := setup.cfg setup.py pyproject.toml
INSTALL := -m pip install --quiet --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help run test test-patched test-oldest lint bench clean

help:  ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

run: $(VENV)/.installed  ## an echo server on port 4040; it says how to talk to it
	@exec $(HERE) examples/echo.py $(PORT)

test: $(VENV)/.installed-test  ## the whole test suite
	$(HERE) -m pytest $(ARGS)

test-patched: $(VENV)/.installed-test  ## the whole test suite in a process that gevent.monkey has patched
	$(HERE) -m gevent.monkey --module pytest $(ARGS)

test-oldest: $(OLDEST)/.installed-test  ## the whole test suite on the oldest gevent that is supported
	$(OLDEST)/bin/python -m pytest $(ARGS)

lint: $(VENV)/.installed-test $(VENV)/.installed-lint  ## ruff on everything, mypy on the package
	$(HERE) -m ruff check .
	$(HERE) -m mypy

bench: $(VENV)/.installed-bench  ## our echo server against raw gevent, asyncio and uvloop; needs a C compiler
	$(HERE) benchmarks/run.py $(ARGS)

clean:  ## remove all that the other targets have made
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis benchmarks/build
	find pants_green tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

# ---- what they need; each stamp is older than the metadata exactly when something may have to be installed

define MAKE_VENV
@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here. Name a Python 3.11 or newer:  make PYTHON=/path/to/python3" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("pants_green needs Python 3.11 or newer, and $(PYTHON) is %d.%d. Name another:  make PYTHON=python3.12" % sys.version_info[:2])'
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments: it lacks ensurepip. Install it (Debian, Ubuntu: the package python3-venv), or name another:  make PYTHON=/path/to/python3" >&2; exit 1; }
$(PYTHON) -m venv $(@D)
@touch $@
endef

$(VENV)/.made $(OLDEST)/.made:
	$(MAKE_VENV)

$(VENV)/.installed: $(VENV)/.made $(METADATA)
	$(HERE) $(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.made $(METADATA)
	$(HERE) $(INSTALL) --editable '.[$*]'
	@touch $@ $(VENV)/.installed

$(OLDEST)/.installed-test: $(OLDEST)/.made $(METADATA)
	$(OLDEST)/bin/python $(INSTALL) --editable '.[test]' gevent==$(GEVENT_OLDEST)
	@touch $@
