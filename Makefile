# Verbs only: what each does lives in the module that it names.

# The first Python that runs (a version manager's shim may exist and still fail) and is new enough.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.requirements-installed

# Passed on only where the user set them, so that every default lives in config/.
PARAMETERS := CLIENTS MIN_CLIENTS FIT_CLIENTS ROUNDS BATCH_SIZE PHYSICAL_BATCH_SIZE LR \
	NOISE_MULTIPLIER MAX_GRAD_NORM EPSILON TASK
quote = '$(subst ','\'',$1)'
params = $(foreach p,$(PARAMETERS),$(if $(filter command environment,$(origin $p)),$(call quote,$p=$(value $p))))

COMPILE = $(PY) -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--prerelease disallow --no-emit-index-url --no-header $(if $(UPGRADE),--upgrade)

.DEFAULT_GOAL := help
.PHONY: help setup run forget audit test test-long lint types bench dashboards lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'Parameters of make run, each as NAME=VALUE: $(PARAMETERS)'

setup: $(STAMP) ## Install the pinned requirements into .venv (every verb does it when needed)

run: setup ## Train: a server and its clients as processes on this machine
	@exec $(PY) -m local run $(params)

forget: setup ## Remove the demo's state, budgets included; asks first
	@exec $(PY) -m local forget

audit: setup ## Attack this installation's client and hold what it leaks against its claim (SHORT=1, POLICY=file)
	@$(PY) -m audit $(if $(SHORT),--short) $(if $(POLICY),--policy $(call quote,$(POLICY)))

test: lint types ## Lint, types and every test that takes seconds (ARGS= goes to pytest)
	$(PY) -m pytest -m 'not long' $(ARGS)

test-long: setup ## The tests that take minutes (ARGS= goes to pytest)
	$(PY) -m pytest -m long $(ARGS)

lint: setup ## Check style with ruff
	$(PY) -m ruff check

types: setup ## Check types with mypy
	$(PY) -m mypy

bench: setup ## Run the benchmarks, or one of them: BENCH=name
	$(PY) -m benchmarks $(BENCH)

dashboards: setup ## Draw docs/*.png from a real run (needs prometheus, chromium, npm)
	$(PY) -m tests.dashboards

lock: setup ## Pin requirements/*.in again; UPGRADE=1 takes newer releases
	$(COMPILE) requirements/dev.in --output-file requirements/dev.txt
	$(COMPILE) requirements/client.in --constraint requirements/dev.txt --output-file requirements/client.txt
	$(COMPILE) requirements/server.in --constraint requirements/dev.txt --output-file requirements/server.txt

clean: ## Remove .venv and caches; state/, runs/ and data/ stay
	rm -rf $(VENV) build htmlcov .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --clear: what is installed is what is pinned, also after a pin was dropped or a setup was cut short.
$(STAMP): requirements/dev.txt
	$(if $(PYTHON),,$(error No Python 3.11 or newer found: install one, or name it with PYTHON=/path/to/python3))
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("PYTHON=%s: expected Python 3.11 \
	or newer, found %d.%d" % ((sys.argv[1],) + sys.version_info[:2]))' '$(PYTHON)'
	@$(PYTHON) -c 'import sys, importlib.util as u; u.find_spec("ensurepip") or sys.exit("$(PYTHON) cannot make \
	a virtual environment: install the package python%d.%d-venv (Debian, Ubuntu)" % sys.version_info[:2])'
	@echo 'Installing the pinned requirements into $(VENV): several GB with PyTorch, once.'
	@$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --disable-pip-version-check --no-input --only-binary :all: --require-hashes -r requirements/dev.txt
	@touch $@
