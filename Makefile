# Everything here works on a fresh Debian 12 machine with python3, pip and make.
# `make run` and `make test` are all a newcomer needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One stamp for each set of packages: running needs the fewest.
RUN := $(VENV)/.run
DEV := $(VENV)/.dev
BENCH := $(VENV)/.bench
# What tests and bench use beside the virtual environment; installed by tools/setup_system.sh when root.
PACKAGES := nginx libnginx-mod-stream haproxy wrk nghttp2-client nghttp2-server curl openssl python3-venv iproute2 chromium-headless-shell systemd clang llvm libbpf-dev libbpf1 prometheus:usr/bin/promtool

# Three processes, a file of tests to each: most tests wait for time to pass, and none shares anything.
PARALLEL ?= -n 3 --dist loadfile --no-loadscope-reorder

# Where properties are tested: `make fuzz` tries each a hundred times as often as the suite does.
FUZZED := tests/wire tests/config/test_fuzz.py tests/config/test_positions.py tests/demo/test_http.py tests/l4/xdp/test_properties.py tests/l4/xdp/test_server_ids.py

.PHONY: run test lint types check dist bpf bench bench-xdp soak outage rolling fuzz format system clean

run: $(RUN)
	$(BIN)/expressgateway demo

test: $(DEV) system
	$(BIN)/python -m pytest $(PARALLEL) $(TESTS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)
	$(BIN)/mypy

check: lint types test

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The wheel and the source distribution, in dist/.
dist: $(DEV)
	$(BIN)/python -m build

# The XDP program's object, which is committed: it is made anew after every change of its source.
bpf: system
	sh tools/build_bpf.sh

bench: $(BENCH) system
	$(BIN)/python -m bench --write

bench-xdp: $(BENCH) system
	$(BIN)/python -m bench.xdp --write

soak: $(BENCH) system
	$(BIN)/python -m bench soak --write

outage: $(BENCH) system
	$(BIN)/python -m bench.outage --policy round_robin,least_requests,maglev --write

rolling: $(BENCH) system
	$(BIN)/python -m bench.rolling

fuzz: $(DEV)
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest --timeout 3600 $(FUZZED)

# Root installs what is missing; anyone else is told, and the tests that need it skip by name.
system:
	@sh tools/setup_system.sh $(PACKAGES)

$(RUN): pyproject.toml tools/setup_venv.sh
	sh tools/setup_venv.sh $(PYTHON) $(VENV) .
	touch $@

$(DEV): pyproject.toml tools/setup_venv.sh
	sh tools/setup_venv.sh $(PYTHON) $(VENV) '.[dev]'
	touch $@ $(RUN)

$(BENCH): pyproject.toml tools/setup_venv.sh
	sh tools/setup_venv.sh $(PYTHON) $(VENV) '.[bench]'
	touch $@ $(RUN)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist
