# Commands, the same here and in CI. `make demo` and `make test` do all the set-up they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PROTOS := $(shell find protos -name '*.proto')
PUBLIC_PROTOS := $(shell find protos/pawl -name '*.proto')
INTERNAL_PROTOS := $(shell find protos/pawl_server -name '*.proto')
# One thread per process in the test suites: two OpenMP pools on two cores starve each other.
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(TEST_ENV) $(PY) -m pytest
# Tests that start no whole server are spread over the processors, a file to a process, so that what a file shares is made once.
SPREAD := --numprocesses logical --maxprocesses 8 --dist loadfile

.PHONY: help setup demo serve test unit property parity fuzz e2e chaos interop check lint types imports proto-lint deploy-check fmt protos sizes bench train test-gpu bench-gpu clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade "pip>=25.1"
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[all]' --group dev
	@touch $@

setup: $(VENV)/.installed ## create .venv and install everything

demo: setup ## start the server on the embedded model, stream completions, show the metrics
	$(TEST_ENV) $(PY) -m pawl_loadtest.demo

serve: setup ## pawl serve, on the embedded model unless MODEL=... is given
	$(BIN)/pawl serve $(MODEL)

test: setup ## unit, property, parity, e2e, chaos and interop tests
	$(PYTEST) $(SPREAD) tests/unit tests/property tests/parity -m "not gpu and not slow"
	$(PYTEST) tests/e2e tests/chaos tests/interop -m "not gpu and not slow"

unit property parity: setup
	$(PYTEST) $(SPREAD) tests/$@ -m "not gpu and not slow"

fuzz: setup ## unit, property and parity tests on examples that no run has drawn before
	HYPOTHESIS_PROFILE=dev PAWL_TEST_TRACES_FROM=$$(date +%s) $(PYTEST) $(SPREAD) tests/unit tests/property tests/parity -m "not gpu and not slow"

e2e chaos interop: setup
	$(PYTEST) tests/$@ -m "not gpu and not slow"

check: setup lint types imports proto-lint deploy-check ## ruff, mypy, import-linter, buf, manifests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports --no-cache

proto-lint: setup
	cd protos && ../$(BIN)/buf lint

deploy-check: setup
	$(PYTEST) tests/unit/deploy -q

fmt: setup ## format the code
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	cd protos && ../$(BIN)/buf format -w

protos: setup ## generate the stubs (commit them by themselves)
	$(PY) -m grpc_tools.protoc -I protos --python_out=client --grpc_python_out=client \
	  --mypy_out=client --mypy_grpc_out=client --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc $(PUBLIC_PROTOS:protos/%=%)
	$(PY) -m grpc_tools.protoc -I protos --python_out=server --grpc_python_out=server \
	  --mypy_out=server --mypy_grpc_out=server --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc $(INTERNAL_PROTOS:protos/%=%)

sizes: setup ## long files and functions, as a report
	$(BIN)/ruff check --select C90,PLR09 --exit-zero .

train: setup ## train the embedded model again
	$(PY) -m pawl_workers.demo_model.train

bench: setup ## output tokens/s against transformers.generate, alternating, same weights
	$(PY) -m pawl_loadtest.bench

peers: setup ## the same against every engine that can be installed, with the machine's limits
	$(PY) -m pawl_loadtest.peers

test-gpu: setup ## the tests that need a CUDA device, with compiled kernels
	$(TEST_ENV) TRITON_INTERPRET=0 $(PY) -m pytest tests -m gpu

bench-gpu: setup ## one GPU: share of the byte bound, against transformers' continuous batching in the same run
	$(PY) -m pawl_loadtest.gpu_bench

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
