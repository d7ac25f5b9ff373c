# Verbs only: what each does lives in the module that it names.

# The first Python that runs (a version manager's shim may exist and still fail) and is new enough.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.requirements-installed
CHECKS := .venv-checks
CHECKS_STAMP := $(CHECKS)/.requirements-installed

# Passed on only where the user set them, so that every default lives in config/.
PARAMETERS := CLIENTS MIN_CLIENTS FIT_CLIENTS ROUNDS BATCH_SIZE PHYSICAL_BATCH_SIZE LR \
	NOISE_MULTIPLIER MAX_GRAD_NORM EPSILON TASK
PLANNED := EPSILON DELTA ROUNDS STEPS BATCH_SIZE RECORDS NOISE_MULTIPLIER
quote = '$(subst ','\'',$1)'
given = $(foreach p,$1,$(if $(filter command environment,$(origin $p)),$(call quote,$p=$(value $p))))
params = $(call given,$(PARAMETERS))

COMPILE = $(PY) -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--prerelease disallow --no-emit-index-url --no-header $(if $(UPGRADE),--upgrade)

.DEFAULT_GOAL := help
.PHONY: help setup run plan forget audit test test-attacks test-long test-containers test-k8s lint types \
	bench dashboards up down images pin sbom render lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'Parameters of make run, each as NAME=VALUE: $(PARAMETERS)'
	@echo 'Parameters of make plan: $(PLANNED)'

setup: $(STAMP) ## Install the pinned requirements into .venv (every verb does it when needed)

run: setup ## Train: a server and its clients as processes on this machine
	@exec $(PY) -m local run $(params)

plan: setup ## What a budget buys: noise for rounds, rounds for noise; plot in runs/plan.svg
	@exec $(PY) -m local plan $(call given,$(PLANNED))

forget: setup ## Remove the demo's state, budgets included; asks first
	@exec $(PY) -m local forget

audit: setup ## Attack this installation's client and hold what it leaks against its claim (SHORT=1, POLICY=file)
	@$(PY) -m audit $(if $(SHORT),--short) $(if $(POLICY),--policy $(call quote,$(POLICY)))

test: lint types ## Lint, types and every test that takes seconds (ARGS= goes to pytest)
	$(PY) -m pytest -m 'not long' --ignore tests/attacks $(ARGS)

test-attacks: setup ## The attacks on the claim, one file a case
	$(PY) -m pytest tests/attacks -m 'not long' $(ARGS)

test-long: setup ## The tests that take minutes (ARGS= goes to pytest)
	$(PY) -m pytest -m long $(ARGS)

# Twenty-five minutes is what all of it may take; building the images counts as the first test's.
test-containers: setup $(CHECKS_STAMP) ## Images and compose, in a Docker daemon of their own; needs root and Debian
	$(PY) -m pytest tests/containers --timeout 1500 -rP $(ARGS)

lint: setup ## Check style with ruff
	$(PY) -m ruff check

types: setup ## Check types with mypy
	$(PY) -m mypy

render: ## Print Kubernetes manifests: CLIENTS=300 or a file, OVERLAY=gpu-cluster, WHAT=ledgers|keys|partitions|clients
	@$(MAKE) --no-print-directory setup >&2
	@exec $(PY) -m k8s $(or $(WHAT),render) $(if $(CLIENTS),--clients $(call quote,$(CLIENTS))) \
		$(if $(OVERLAY),--overlay $(call quote,$(OVERLAY))) $(if $(ONLY),--only $(ONLY)) \
		$(if $(PKI),--pki $(call quote,$(PKI)))

test-k8s: setup ## The manifests against a real control plane, which it builds once (ARGS= goes to pytest)
	-@$(PY) -m tests.k8s.binaries
	$(PY) -m pytest tests/k8s $(ARGS)

bench: setup ## Run the benchmarks but endurance, or one of them: BENCH=name
	$(PY) -m benchmarks $(BENCH)

# REVISION names the commit in the images' labels.
COMPOSE = REVISION=$(shell git rev-parse HEAD 2>/dev/null) docker compose $(if $(CPU),--file compose.yaml)

up: ## The whole federation in containers; CPU=1 without a GPU (as docker compose up)
	$(COMPOSE) up --build --detach

down: ## Stop and remove the containers; the volumes, and the budgets in them, stay
	$(COMPOSE) down

images: ## Build the images
	$(COMPOSE) build

pin: ## Give each image in .env the digest that its tag has in its registry now
	$(PYTHON) docker/pin.py

sbom: images ## Copy the images' bills of materials to build/
	mkdir -p build
	for image in server client; do $(COMPOSE) run --rm -T --no-deps --entrypoint cat $$image /opt/fedeps/sbom.cdx.json \
		> build/$$image.cdx.json || exit; done

dashboards: setup ## Draw docs/*.png from a real run (needs prometheus, chromium, npm)
	$(PY) -m tests.dashboards

lock: setup ## Pin requirements/*.in again; UPGRADE=1 takes newer releases
	$(COMPILE) requirements/dev.in --output-file requirements/dev.txt
	$(COMPILE) requirements/torch.in --constraint requirements/dev.txt --output-file requirements/torch.txt
	$(COMPILE) requirements/client.in --constraint requirements/dev.txt --output-file requirements/client.txt
	$(COMPILE) requirements/server.in --constraint requirements/dev.txt --output-file requirements/server.txt
	$(COMPILE) requirements/sbom.in --output-file requirements/sbom.txt
	$(COMPILE) requirements/checks.in --output-file requirements/checks.txt
	$(COMPILE) requirements/k8s-checks.in --output-file requirements/k8s-checks.txt

clean: ## Remove .venv and caches; state/, runs/ and data/ stay
	rm -rf $(VENV) $(CHECKS) build htmlcov .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --clear: what is installed is what is pinned, also after a pin was dropped or a setup was cut short.
# --no-deps: the pins are all there is, and pip does not resolve. Its resolver refuses a pinned name[extra] without a hash
# once there is a newer release.
$(STAMP): requirements/dev.txt
	$(if $(PYTHON),,$(error No Python 3.11 or newer found: install one, or name it with PYTHON=/path/to/python3))
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("PYTHON=%s: expected Python 3.11 \
	or newer, found %d.%d" % ((sys.argv[1],) + sys.version_info[:2]))' '$(PYTHON)'
	@$(PYTHON) -c 'import sys, importlib.util as u; u.find_spec("ensurepip") or sys.exit("$(PYTHON) cannot make \
	a virtual environment: install the package python%d.%d-venv (Debian, Ubuntu)" % sys.version_info[:2])'
	@echo 'Installing the pinned requirements into $(VENV): several GB with PyTorch, once.'
	@$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --disable-pip-version-check --no-input --no-deps --only-binary :all: --require-hashes \
		-r requirements/dev.txt
	@touch $@

# Linters with many dependencies, apart from ours.
$(CHECKS_STAMP): requirements/checks.txt
	@$(PYTHON) -m venv --clear $(CHECKS)
	$(CHECKS)/bin/python -m pip install --disable-pip-version-check --no-input --quiet --no-deps --only-binary :all: \
		--require-hashes -r $<
	@touch $@
