PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test soak wheel-test test-cuda-build test-lowest test-ray strangers lint docs docs-check table bench gpu-kit clean

help:
	@echo "make demo    LeNet-5 on digits, 4 CPU ranks, one slowed down 4x: async_amsgrad beside ddp"
	@echo "make test    the test suite"
	@echo "make soak    the larger forms of some tests: more runs in a row, more fits, more seeds; 2,000 faults (hours)"
	@echo "make wheel-test    installs the wheel in a fresh environment and does what README and quick start say; 1.5 GB"
	@echo "make test-cuda-build    the test suite with the build of torch that pip installs on Linux; needs no GPU, 6 GB"
	@echo "make test-lowest    the test suite with the oldest releases that pyproject.toml allows; 6 GB"
	@echo "make test-ray    the tests that train in Ray, in an environment of their own"
	@echo "make strangers    other people's projects under async_amsgrad, in an environment of their own"
	@echo "make lint    ruff, mypy and the rooms' contracts (import-linter)"
	@echo "make docs    the documentation, into site/"
	@echo "make docs-check    the documentation in a browser (Chromium), on a desk and on a phone"
	@echo "make table   the table of what works (docs/compatibility.md), from the tests"
	@echo "make bench   the straggler benchmark"
	@echo "make gpu-kit    the wheels that tests/gpu/run.sh takes along to a machine with a GPU and no network"
	@echo "make clean   remove $(VENV) and $(VENV)-*, caches and results"

# Installed once, and again when what is to be installed has changed.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/lightning-async demo

# Two at a time: most tests wait for ranks that sleep.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

soak: $(STAMP)
	$(BIN)/python -m pytest -m soak
	$(BIN)/python -m tests.faults.soak --faults 2000
	$(BIN)/python -m tests.faults.soak --deaths 200

wheel-test: $(STAMP)
	$(BIN)/python -m pytest -m wheel tests/wheel

# Without constraints.txt, which stands for the CPU build.
test-cuda-build:
	$(PYTHON) -m venv $(VENV)-cuda
	$(VENV)-cuda/bin/python -m pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1
	$(VENV)-cuda/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	$(VENV)-cuda/bin/python -m pytest -n 2 --dist worksteal

test-lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e ".[dev]"
	$(VENV)-lowest/bin/python -m pytest -n 2 --dist worksteal

test-ray:
	$(PYTHON) -m venv $(VENV)-ray
	$(VENV)-ray/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -e . -r tests/ray/requirements.txt
	$(VENV)-ray/bin/python -m pytest -m ray tests/ray

strangers:
	$(PYTHON) -m venv $(VENV)-strangers
	$(VENV)-strangers/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -e . -r tests/strangers/requirements.txt
	$(VENV)-strangers/bin/python -m pytest -m strangers tests/strangers

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

docs-check: docs
	$(BIN)/python -m pytest -m browser tests/docs
	$(BIN)/python -m tests.docs.browser site

table: $(STAMP)
	$(BIN)/python -m tests.compatibility.table

bench: $(STAMP)
	$(BIN)/python -m benchmarks.straggler

gpu-kit: $(STAMP)
	$(BIN)/python -m tests.gpu.wheels make

clean:
	rm -rf $(VENV) $(VENV)-strangers $(VENV)-cuda $(VENV)-lowest $(VENV)-ray site build dist .pytest_cache .mypy_cache .ruff_cache demo_results runs
