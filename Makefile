# Everything here works on a fresh Debian 12 machine with python3, pip and make.
# `make run` and `make test` are all a newcomer needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What tests and bench use beside the virtual environment; installed by tools/setup_system.sh when root.
PACKAGES := nginx libnginx-mod-stream haproxy wrk nghttp2-client curl openssl python3-venv iproute2

.PHONY: run test lint types check bench soak fuzz format system clean

run: $(STAMP)
	$(BIN)/expressgateway demo

test: $(STAMP) system
	$(BIN)/python -m pytest $(TESTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

check: lint types test

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) system
	$(BIN)/python -m bench --write

soak: $(STAMP) system
	$(BIN)/python -m bench soak --write

fuzz: $(STAMP)
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -m fuzz --timeout 3600

# Root installs what is missing; anyone else is told, and the tests that need it skip by name.
system:
	@sh tools/setup_system.sh $(PACKAGES)

$(STAMP): pyproject.toml tools/setup_venv.sh
	sh tools/setup_venv.sh $(PYTHON) $(VENV)
	touch $(STAMP)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build
