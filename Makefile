# `make` lists the targets. MODEL and ARGS reach the command: make serve MODEL=Qwen/Qwen3-8B ARGS="--port 9000"

SHELL := bash
MODEL ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install serve check format test clients bench tiny clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## install into .venv, for the GPU if there is one (MULL_DEVICE=cpu|gpu decides otherwise)
	@scripts/install.sh dev finetune calibrate

serve: install ## serve MODEL, or the embedded model; ARGS as for `vllm serve`
	.venv/bin/mull serve $(MODEL) $(ARGS)

check: install ## lint, formatting, types, import contracts
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright
	.venv/bin/lint-imports

format: install ## fix what ruff can fix, then format
	.venv/bin/ruff check --fix-only
	.venv/bin/ruff format

test: check ## everything that CI runs: check, then the tests
	.venv/bin/pytest -q $(ARGS)

clients: .venv-clients/complete ## install other people's clients into .venv-clients, and test with them
	.venv/bin/pytest -q tests/clients $(ARGS)

# Not into .venv, where Instructor does not resolve. By uv: pip fetches so many packages one after another, for minutes.
.venv-clients/complete: tests/clients/requirements.txt | install
	.venv/bin/python -m venv --clear .venv-clients
	.venv-clients/bin/python -m pip --disable-pip-version-check -qq install uv==0.13.9
	.venv-clients/bin/uv pip install --quiet --no-deps --python .venv-clients --requirement $<
	touch $@

bench: install ## measure; ARGS go to `python -m bench`
	.venv/bin/python -m bench $(ARGS)

tiny: install ## train the embedded model again; resumes where it was stopped
	.venv/bin/python -m finetune.tiny.train --out models/mull-tiny

clean: ## remove caches and builds, keep .venv and runs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
