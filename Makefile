PROFILE ?= cpu
VENV ?= .venv
PYTHON ?= python3
# Test files that run side by side; each computes with one thread (tests/conftest.py).
TEST_WORKERS ?= 2
export VENV
# empty is off: what is imported here is compiled once
export PYTHONDONTWRITEBYTECODE :=
BIN := $(VENV)/bin

.PHONY: help setup study check test bench-scale bench-train lint lock clean

help:
	@echo "make setup    the environment in $(VENV) (PROFILE=cpu or gpu); minutes once, then nothing"
	@echo "make study    the quick start: does augmentation help, how much is enough, at what cost"
	@echo "make check    lint, types, import contracts, and the tests that start nothing heavy; two minutes"
	@echo "make test     lint and all tests; tests of pages need Chromium, which is installed where apt-get and root allow it"
	@echo "make bench-scale   generation at scale, measured on this machine beside its peers; an hour"
	@echo "make bench-train   training and search, measured on this machine beside their peers; with DATA=BEIR_FOLDER also"
	@echo "                   encoding; 40 minutes"
	@echo "make lint     ruff, mypy and the import contracts"
	@echo "make lock     resolve requirements/PROFILE.in into its lock"
	@echo "make clean    remove caches and build products; results and $(VENV) stay"

setup:
	@$(PYTHON) scripts/setup.py $(PROFILE)

study: setup
	$(BIN)/dagr study jobs/quickstart.py

check: setup
	$(MAKE) lint
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder \
		-m "not (engine or cluster or browser or slow)"

test: setup
	-@$(BIN)/python -m tests.support.browser
	$(MAKE) lint
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

# Each of the scripts, whatever became of those before it; fails in the end where one of them missed a bound.
EVERY = missed=; for each in $(1); do set -- $$each; name=$$1; shift; \
	$(BIN)/python -m benchmarks.$$name "$$@" || missed="$$missed $$name"; done; \
	if [ -n "$$missed" ]; then echo "missed:$$missed"; exit 1; fi

bench-scale: setup
	@$(call EVERY,speed.generation speed.prefix speed.orchestration scale.tail faults.chaos scale.scaling publish.readme)

bench-train: setup
	@$(call EVERY,speed.training scale.training_stream speed.search faults.bm25_ray $(if $(DATA),"speed.encoding $(DATA)"))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lock:
	$(BIN)/python scripts/lock.py $(PROFILE)

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
