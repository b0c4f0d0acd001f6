# Two commands do everything: `make demo` and `make test`. The environment is .venv, made by `make setup` when it is missing.
SHELL := /bin/bash
.DEFAULT_GOAL := help
BIN := .venv/bin
PACKAGES := api protocol operator runtime cli

# CPU machines: one thread a process (two spinning OpenMP threads cost vLLM a factor of 40), nothing fetched at run time.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1
export DO_NOT_TRACK ?= 1
# Where this is set, every process compiles torch and transformers anew: a start takes 24 s in place of 9 s.
unexport PYTHONDONTWRITEBYTECODE

# Whole files go to one of these processes, in their order: the end-to-end tests, which take longest and start four or five
# processes more each, come first, so that none of them is left over at the end.
TEST_PROCESSES ?= 2

# Nodes of the dev cluster. Its name and cache: RLJOB_CLUSTER, RLJOB_CACHE (docs/dev-cluster.md).
NODES ?= 1

.PHONY: help setup demo test lint type fmt generate verify bench cluster cluster-down e2e e2e-all clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 24

setup:  ## make .venv and install everything (1 to 4 minutes once, then nothing)
	@tools/setup.sh

demo: setup  ## run examples/quickstart.yaml: real vLLM and torch, 2 rollout workers, 160 weight versions (about 6 minutes on 2 cores)
	@echo "demo: training a small model to copy digits, asynchronously, on this machine (about 6 minutes on 2 cores)"
	@$(BIN)/rljob run examples/quickstart.yaml

test: setup lint type verify  ## lint, types, import contracts and all tests with real parts (about 20 minutes on 2 quiet cores)
	@echo "test: unit, protocol, numerics, integration with real nats-server, vLLM and torch (about 18 minutes on 2 cores)"
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

lint: setup  ## ruff and import contracts (seconds)
	@$(BIN)/ruff check $(PACKAGES) tests bench tools
	@$(BIN)/ruff format --check $(PACKAGES) tests bench tools
	@$(BIN)/lint-imports --no-cache

type: setup  ## strict type check (a minute when cold)
	@$(BIN)/mypy

fmt: setup  ## format the code
	@$(BIN)/ruff check --fix $(PACKAGES) tests bench tools
	@$(BIN)/ruff format $(PACKAGES) tests bench tools

generate: setup  ## write what is made from the code: crds/rljob.yaml and the chart's copy
	@$(BIN)/rljob crd > crds/rljob.yaml.new && mv crds/rljob.yaml.new crds/rljob.yaml
	@cp crds/rljob.yaml charts/rljob/files/rljob-crd.yaml

verify: setup  ## fail when a generated file is behind the code
	@$(BIN)/rljob crd | diff -u crds/rljob.yaml - \
		|| { echo "verify: crds/rljob.yaml is behind the models: run 'make generate' and commit it" >&2; exit 1; }
	@cmp crds/rljob.yaml charts/rljob/files/rljob-crd.yaml \
		|| { echo "verify: the chart's copy of the CRD is behind: run 'make generate' and commit it" >&2; exit 1; }

bench: setup  ## measure what we claim about speed and memory; writes docs/benchmarks.md (about 10 minutes on 2 quiet cores)
	@echo "bench: ratios within one run, on an otherwise quiet machine (about 10 minutes on 2 cores)"
	@$(BIN)/python -m bench

cluster: setup  ## a real Kubernetes on this machine, as root (7 s; the first time it builds Kubernetes: about 15 minutes)
	@$(BIN)/python -m tools.devcluster up --nodes $(NODES)

cluster-down: setup  ## take it away; prints what is left
	@$(BIN)/python -m tools.devcluster down

e2e: setup  ## tests on a real Kubernetes: the dev cluster, or the one that KUBECONFIG names
ifdef KUBECONFIG
	@$(BIN)/python -m pytest tests/cluster --ignore tests/cluster/behaviour
else
	@trap '$(BIN)/python -m tools.devcluster down' EXIT; \
	  $(BIN)/python -m tools.devcluster up --nodes $(NODES) && $(BIN)/python -m tools.devcluster exec -- \
	    sh -c 'RLJOB_E2E_KUBECONFIG=$$KUBECONFIG $(BIN)/python -m pytest -q tests/schema/test_on_apiserver.py \
	      && kubectl delete --timeout=60s crd rljobs.rljob.dev' \
	  && $(BIN)/python -m pytest tests/cluster --ignore tests/cluster/behaviour
endif

e2e-all: setup  ## the same, and every behaviour of the operator, most with the simulated engine; writes docs/e2e.md (about 45 minutes)
	@trap '$(BIN)/python -m tools.devcluster down' EXIT; \
	  $(BIN)/python -m tools.devcluster up --nodes $(NODES) && $(BIN)/python -m tools.devcluster exec -- \
	    sh -c 'RLJOB_E2E_KUBECONFIG=$$KUBECONFIG $(BIN)/python -m pytest -q tests/schema/test_on_apiserver.py \
	      && kubectl delete --timeout=60s crd rljobs.rljob.dev' \
	  && RLJOB_E2E_LOG=docs/e2e.md RLJOB_E2E_STEPS=60 $(BIN)/python -m pytest tests/cluster

clean:  ## remove the environment, caches and runs
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis runs
