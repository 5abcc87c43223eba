# On a fresh machine: `make demo` shows what the library does, `make test` checks that it does.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find mlflow_ctx_autolog -name '*.py' -o -name 'py.typed' -o -path '*/pages/*') \
	setup.cfg pyproject.toml entry_points.txt README.md

# A Java that set-up found or fetched; empty where the one on PATH will do.
RUN = JAVA_HOME="$$(cat .venv/java-home)"; [ -z "$$JAVA_HOME" ] || export JAVA_HOME;

# Tests start many a Spark for seconds, for which Java's better compiler costs more than it saves.
RUN_TESTS = $(RUN) export JAVA_TOOL_OPTIONS=-XX:TieredStopAtLevel=1;

.PHONY: setup lock demo test test-slow coverage test-unit matrix oldest lint format \
	bench bench-quick bench-setup faults coverage-table no-traces-page \
	settings-page docs clean

setup: .venv/library

# uv, where it is there, takes a third of the time.
ifneq ($(shell command -v uv),)
INSTALL = uv pip install --quiet --python $(BIN)/python
else
INSTALL = $(BIN)/pip install --quiet
endif

# Everything but the library itself, in the versions of dev.lock; made again when they change.
.venv/dependencies: setup.cfg pyproject.toml dev.lock tools/java.py
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14) and \
		"Python 3.10 to 3.13 is needed, this is " + sys.version + "; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	$(INSTALL) --constraint dev.lock --group dev --group demo '.[spark]'
	$(BIN)/python tools/java.py > .venv/java-home
	touch $@

# The built wheel is what tests, demo and benchmarks run, not the checkout.
.venv/library: .venv/dependencies $(SOURCES)
	rm -rf build dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/pip install --quiet --no-deps --force-reinstall dist/*.whl
	rm -rf build
	touch $@

# The newest releases that fit, for the next year.
lock:
	uv pip compile setup.cfg --extra local --extra otlp --group dev --group demo --group bench \
		--universal --python-version 3.10 --no-annotate --no-header --upgrade \
		--output-file dev.lock --quiet

demo: setup
	@$(RUN) $(BIN)/python demo/run.py $(DOCUMENTS)

# Two files at a time, since most tests wait for Spark or a server to start; in this order, since
# those come first that take longest.
AT_ONCE = -n 2 --dist loadfile --no-loadscope-reorder

# Not run from the root of the checkout, where Python would find the sources before the wheel.
test: setup
	@$(RUN_TESTS) cd tests && ../$(BIN)/pytest . -m "not slow" $(AT_ONCE) $(ARGS)

# What takes longest for what it shows: before a release, and after a change to what it is about.
test-slow: setup
	@$(RUN_TESTS) cd tests && ../$(BIN)/pytest . -m slow $(AT_ONCE) $(ARGS)

# All tests, and which lines they reach in this process; not those that only workers run.
coverage: setup
	@$(RUN_TESTS) cd tests && ../$(BIN)/pytest . $(AT_ONCE) \
		--cov --cov-config=../pyproject.toml --cov-report=term $(ARGS)

test-unit: setup
	@$(RUN) cd tests && ../$(BIN)/pytest unit $(ARGS)

# Each row of noxfile.py, an hour in all; one with make matrix ROWS=pyspark-3.5.
matrix: setup
	@$(RUN_TESTS) $(BIN)/nox $(addprefix --session ,$(ROWS))

oldest: setup
	@$(RUN_TESTS) $(BIN)/nox --session oldest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What tracing costs, by this library and by others: an hour on a quick machine.
bench: bench-setup
	@$(RUN) $(BIN)/python benchmarks/bench.py --write docs/benchmarks
	@$(RUN) $(BIN)/python benchmarks/call_cpu.py
	@$(RUN) $(BIN)/python benchmarks/one_trace.py
	@$(RUN) $(BIN)/python benchmarks/delivery.py
	@$(RUN) $(BIN)/python benchmarks/driver_memory.py
	@$(RUN) $(BIN)/python benchmarks/large_job.py

bench-quick: bench-setup
	@$(RUN) $(BIN)/python benchmarks/bench.py --quick

bench-setup: setup
	$(INSTALL) --constraint dev.lock --group bench

# Takes half an hour.
faults: setup
	@$(RUN) $(BIN)/python benchmarks/faults.py --write docs/faults.md
	@$(RUN) $(BIN)/python benchmarks/call_delays.py --write docs/call-delays.md

coverage-table: setup
	$(BIN)/python tests/support/coverage_table.py

# From what the checks of doctor() say of themselves, and from the definition of the settings.
no-traces-page: setup
	@$(BIN)/python tools/no_traces_page.py

# The site, in site. Anything that is amiss, such as a link to nowhere, is an error.
docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

settings-page: setup
	@$(BIN)/python tools/settings_page.py

clean:
	rm -rf .venv .nox .demo build dist *.egg-info
