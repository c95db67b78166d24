# All targets use .venv/, which scripts/setup.sh creates and updates.
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-long docs audit check format setup-demo setup-dev setup-docs setup-long clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 14

demo: setup-demo ## compress a small sentence encoder on this machine
	$(BIN)/mlorq compress examples/demo.yaml

# A process more than cores: tests wait for servers, processes and disks for a seventh of their time. Files whose tests
# need a Prefect server go to one process (tests/conftest.py).
test: check ## what CI runs: check, then the tests that are not marked long
	$(BIN)/python -m pytest -n $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )) --maxprocesses 4 --dist loadfile

test-long: setup-long ## only the tests marked long
	$(BIN)/python -m pytest -m long

docs: setup-docs ## build the documentation site into build/site; warnings are errors
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -d build/doctrees . build/site
	@echo build/site/index.html

audit: setup-dev ## known vulnerabilities, licences and bill of materials of the dependencies
	$(BIN)/python scripts/audit.py

# Disables the telemetry of Prefect's server in the tests.
test test-long: export PREFECT_SERVER_ANALYTICS_ENABLED = false
test test-long: export DO_NOT_TRACK = 1

check: setup-dev ## lint, format check, types, imports between packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup-dev ## format the code and apply the linter's safe fixes
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

setup-demo:
	@bash scripts/setup.sh demo

setup-long: setup-dev
	@bash scripts/setup.sh ray

setup-dev:
	@bash scripts/setup.sh demo,dev,docs,detection,audio,hub,metrics,mlflow,onnx,openvino,s3,dask,docker,server

setup-docs:
	@bash scripts/setup.sh docs

# Keeps the stores (.mlorq/), whose results may have taken hours, and .venv/, which takes minutes.
clean: ## remove caches and build outputs
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -path ./.venv -prune -o -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +
