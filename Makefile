# `make demo` and `make test` are all that a fresh machine needs (python3 >= 3.11 with venv, make).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The environment is made anew only when what is to be installed has changed.
READY := $(VENV)/ready

.PHONY: demo test faults faults-long lint types docs-test screenshots bench bench-plots clean

demo: $(READY)
	"$(BIN)/python" -m tasks.demo

# Options for pytest: make test TESTS="tests/test_store.py -x". Three processes run them, since most tests wait for something.
TESTS ?=
TEST_PROCESSES ?= 3

test: $(READY)
	"$(BIN)/python" -m pytest -q -n $(TEST_PROCESSES) --dist worksteal $(TESTS)

# Two processes, since most of these wait for something, too. Each test adds what it counted to out/faults.jsonl.
faults: $(READY)
	@mkdir -p out && rm -f out/faults.jsonl
	FAULTS_REPORT="$(CURDIR)/out/faults.jsonl" "$(BIN)/python" -m pytest -q -n 2 --dist worksteal --timeout 600 -m "faults and not faults_long"; \
	status=$$?; cat out/faults.jsonl; exit $$status

faults-long: $(READY)
	FAULTS_LONG=1 "$(BIN)/python" -m pytest -q -s --timeout 3600 -m "faults or faults_long"

lint: $(READY)
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .

types: $(READY)
	"$(BIN)/mypy"

# Every tutorial and how-to, followed as a reader does, in an empty folder.
docs-test: $(READY)
	"$(BIN)/python" -m pytest -q -n $(TEST_PROCESSES) --dist worksteal -m docs tests/test_docs.py

# Every page of the dashboard, light and dark. Needs a Chromium.
screenshots: $(READY)
	"$(BIN)/python" tests/web/dashboard_site.py docs/images/dashboard

bench: $(READY)
	"$(BIN)/python" -m pip install -q -r benchmarks/requirements.txt
	mkdir -p out
	"$(BIN)/python" benchmarks/queue.py --systems all --only submit,drain,latency,idle,flat --json out/queue.json

bench-plots: out/queue.json
	"$(BIN)/python" benchmarks/plots.py out/queue.json docs/images

out/queue.json:
	$(MAKE) bench

clean:
	rm -rf $(VENV) out .mlqueue

$(READY): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mlqueue needs Python 3.11 or newer; this is %s. Say which: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	"$(BIN)/python" -m pip install -q --disable-pip-version-check -e ".[dev]"
	touch $(READY)
