# `make help` lists the targets. PYTHON may be any Python from 3.11 on; it only makes .venv.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup doctor demo test lint bench-selection bench-attention bench-fidelity bench-scaling bench-service test-versions format stubs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Create or update .venv (the other targets do so first)
	@$(PYTHON) tools/setup_env.py

doctor: setup ## Say what this machine can do, and what is missing
	@$(BIN)/prefill-service doctor

demo: setup ## Upload a video, prefill it on two ranks, ask three questions, draw a picture
	@$(BIN)/python -m tools.demo

test: lint ## Check style and types, run all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-versions: setup ## Run tests with the oldest and newest packages supported (hours, GBs)
	@$(BIN)/python -m tools.test_versions

lint: setup ## Check style and types with ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-selection: setup ## Compare ways to choose key blocks: estimators, key orders, rules
	@OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.quality.selection
	@OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.quality.selection \
		--checkpoint assets/needle-qwen3-vl

bench-scaling: setup ## Measure traffic and work on 1 to 4 ranks; project to 8 and 32 GPUs
	@OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.parallel.scaling

bench-fidelity: setup ## Measure what approximation costs in answers, by quality, length and ranks
	@OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.quality.fidelity

bench-attention: setup ## Time dense, sparse and FlexAttention on this CPU, 4K to 32K tokens
	@OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.attention.cpu

bench-service: setup ## Time the first token of this service, vLLM alone and transformers
	@OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.service

format: setup ## Let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

stubs: setup ## Regenerate the gRPC stubs from protos/
	$(BIN)/python tools/generate_stubs.py

clean: ## Remove build outputs and caches, but not .venv
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
