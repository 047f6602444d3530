# `make help` lists the targets. PYTHON may name any Python >= 3.11; it is only used to make .venv.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench-selection bench-attention bench-fidelity bench-scaling bench-service format stubs clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Create or update .venv (done by the other targets too)
	@$(PYTHON) tools/setup_env.py

demo: setup ## A video, two ranks, vLLM, three questions: upload to answers and a picture
	@$(BIN)/python -m tools.demo

test: lint ## Lint, types and the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-selection: setup ## Which key blocks to keep: estimators, key orders, rules
	@OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.selection
	@OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.selection \
		--checkpoint assets/needle-qwen3-vl

bench-scaling: setup ## Traffic and work on 1 to 4 ranks here; projections to 8 and 32 GPUs
	@OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.sp_scaling

bench-fidelity: setup ## What approximation costs in answers: accuracy per quality, length, rank count
	@OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.fidelity

bench-attention: setup ## Dense, ours and FlexAttention on this CPU, 4K to 32K tokens
	@OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.attention_cpu

bench-service: setup ## From question to first token: the service, vLLM alone, transformers
	@OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.service

format: setup ## Let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

stubs: setup ## Regenerate the gRPC stubs from protos/
	$(BIN)/python tools/generate_stubs.py

clean: ## Remove build outputs and caches (keeps .venv)
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
