PROFILE ?= cpu
VENV ?= .venv
PYTHON ?= python3
# Test files that run side by side.
TEST_WORKERS ?= 2
export VENV
BIN := $(VENV)/bin

.PHONY: help setup study test bench-scale bench-train lint lock clean

help:
	@echo "make setup    the environment in $(VENV) (PROFILE=cpu or gpu); minutes once, then nothing"
	@echo "make study    the quick start: does augmentation help, how much is enough, at what cost"
	@echo "make test     lint and all tests"
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

test: setup
	-@$(BIN)/python -m tests.browser
	$(MAKE) lint
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

bench-scale: setup
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/prefix.py
	$(BIN)/python benchmarks/orchestration.py
	$(BIN)/python benchmarks/tail.py
	$(BIN)/python benchmarks/chaos.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/readme.py

bench-train: setup
	@status=0; for each in training training_stream search bm25_ray $(if $(DATA),"encoding $(DATA)"); do \
		echo "benchmarks/$$each"; set -- $$each; name=$$1; shift; \
		$(BIN)/python benchmarks/$$name.py "$$@" || status=1; \
	done; exit $$status

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
