# The client lives in .venv, each engine in an environment of its own; stamps let a second call reuse the first.
# PYTHON names the interpreter to build them with; PINNED a list of exact versions with hashes (CI); TORCH_INDEX an index with CPU builds of torch (make vllm).
PYTHON ?= python3
PIP_FLAGS ?= -qq --disable-pip-version-check
BIN := .venv/bin

export TORCH_INDEX

.DEFAULT_GOAL := help
.PHONY: help install llama quickstart vllm vllm-engine peers test test-full test-vllm lint bench example gallery clean

help:  ## these targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

install: .venv/.stamp  ## the command `ridgeline`, in .venv

.venv/.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ridgeline needs Python 3.11 or newer; name one with: make PYTHON=python3.11 ...")'
	@echo 'making .venv (about half a minute)'
	$(PYTHON) -m venv .venv
	$(if $(PINNED),$(BIN)/python -m pip install $(PIP_FLAGS) --require-hashes -r $(PINNED))
	$(BIN)/python -m pip install $(PIP_FLAGS) $(if $(PINNED),--no-deps --no-build-isolation) -e .
	$(BIN)/python -m compileall -q harness
	@touch $@

.venv/.stamp-dev: .venv/.stamp
	$(if $(PINNED),,$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[test,dev]')
	@touch $@

llama: install
	@$(BIN)/python -m harness.setup_engine llama

vllm-engine: install
	@$(BIN)/python -m harness.setup_engine vllm
	@$(BIN)/python -m harness.random_model .models/llama-134m

quickstart: llama  ## measure a small real model on llama.cpp, here; writes reports/quickstart.html
	$(BIN)/ridgeline run scenarios/quickstart.yaml

vllm: vllm-engine  ## the same with vLLM's CPU build; writes reports/vllm-cpu.html
	$(BIN)/ridgeline run scenarios/vllm-cpu.yaml

test: .venv/.stamp-dev llama  ## the tests, llama.cpp's engine among them
	$(BIN)/python -m pytest -m 'not full and not vllm'

test-full: .venv/.stamp-dev llama  ## the long property tests
	$(BIN)/python -m pytest -m full

test-vllm: .venv/.stamp-dev vllm-engine  ## those that drive a real vLLM
	$(BIN)/python -m pytest -m vllm

lint: .venv/.stamp-dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gallery: .venv/.stamp-dev  ## the example page and the README's pictures, anew from the stored run
	$(BIN)/ridgeline report results/reference/example --slo ttft_p50=1s,itl_p50=50ms --price 0.10/h -o reports/example.html
	$(BIN)/python -m tests.gallery shoot reports/example.html reports

example: vllm-engine  ## measure that run anew (vLLM on this machine's CPU; on a quiet machine)
	rm -rf build/example
	$(BIN)/ridgeline run scenarios/vllm-cpu.yaml --trials 3 --no-report --out build/example
	$(BIN)/ridgeline report build/example -o build/example/report.html
	$(BIN)/python -m tests.gallery share build/example
	rm -rf results/reference/example && mkdir -p results/reference && mv build/example results/reference/

peers: install  ## guidellm and aiperf, for `make bench`
	@$(BIN)/python -m harness.setup_engine peers
	@$(BIN)/python -m harness.random_model .models/llama-134m

bench: install  ## how true the client is and what it costs, beside its peers where `make vllm` and `make peers` were run
	$(BIN)/python -m tests.bench

clean:  ## remove environments, models and caches; results and reports stay
	rm -rf .venv .venv-llama .venv-vllm .venv-peers .models build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find harness tests -name __pycache__ -type d -prune -exec rm -rf {} +
