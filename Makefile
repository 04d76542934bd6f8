# make demo: set up, run the main job on this machine, then a small one in two processes, write runs/report.html
# make test: set up, run lint, types, import rules and tests
# make peers: build the environments of the peers (.venv-unsloth, …), one each, from the locks in engines/requirements; make peer-unsloth builds one
# make test-peers: set up, build them, run the tests that run the peers' own packages
# make figures: set up, measure what the harness itself costs, write docs/figures.md; wants a quiet machine
PYTHON ?= python3
VENV ?= .venv
# torch comes first: it decides between a CPU and a CUDA build. TORCH='torch==2.13.0 --index-url …' chooses another source.
TORCH ?= torch==2.13.0
# Only where torch brought none (CPU builds): the version whose interpreter the kernels are tested with.
TRITON ?= triton==3.6.0

BIN := $(VENV)/bin
INPUTS := pyproject.toml requirements/constraints.txt requirements/no-deps.txt
PEERS := $(patsubst engines/requirements/%.txt,%,$(wildcard engines/requirements/*.txt))

.PHONY: demo test lint format figures peers test-peers clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/python -m harness -m +sweep=demo
	$(BIN)/python -m harness -m +sweep=processes

# Two processes, each with whole files: a test's ranks and kernels in the interpreter keep one core busy.
test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

peers: $(PEERS:%=.venv-%/.installed)

peer-%: .venv-%/.installed
	@echo "$* is ready: python -m harness engine=$*"

test-peers: $(VENV)/.installed-test peers
	$(BIN)/python -m pytest -m adapter

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

figures: $(VENV)/.installed
	$(BIN)/python -m scripts.bench_harness --write docs/figures.md

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: $(INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet $(TRITON)
	$(BIN)/python -m pip install --quiet --editable . --constraint requirements/constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements/no-deps.txt
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test]' --constraint requirements/constraints.txt
	touch $@

# The lock is whole and hashed, so nothing is resolved; torch is not in it, because the hardware decides which build.
# Axolotl declares Python 3.12 and passes its tests here on 3.11, too.
.venv-%/.installed: engines/requirements/%.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(TORCH)
	$(@D)/bin/python -c "import triton" 2>/dev/null || $(@D)/bin/python -m pip install --quiet $(TRITON)
	$(@D)/bin/python -m pip install --quiet --no-deps --require-hashes --ignore-requires-python --requirement $<
	touch $@

clean:
	rm -rf $(VENV) $(PEERS:%=.venv-%) runs .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
