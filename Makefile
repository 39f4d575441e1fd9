# make demo    set up, then distil the embedded teacher and report (about a quarter of an hour)
# make test    set up, then lint, type-check and test
# make lint    ruff and mypy only
# make docs    set up, then build the documentation site, strictly, into build/site
# make lock    requirements.lock anew from constraints.txt, with the sha256 of every file
# make sbom    build/sbom.json: what the lock holds, as CycloneDX
# make audit   known vulnerabilities of what the lock holds
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MINUTES ?= 12
# torch from its CPU wheel where pip finds one; elsewhere pip's own choice of the same version.
STAMP := $(VENV)/.installed
# Large allocations kept by the process: CPU training spends its time in the kernel otherwise.
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 100000000000
export MALLOC_TOP_PAD_ ?= 1073741824

.PHONY: setup demo test lint docs lock sbom audit clean
setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@
	@echo "installed; now: source $(BIN)/activate"

demo: setup
	$(BIN)/twostep demo --minutes $(MINUTES)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.docs: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[docs]"
	touch $@

$(VENV)/.release: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[release]"
	touch $@

LOCK_HEAD := \# Every package of a whole set-up with the sha256 of its files: CPython 3.11, Linux on x86-64. make lock
lock: $(VENV)/.release
	mkdir -p build
	$(BIN)/uv pip compile --quiet --no-config --python-version 3.11.7 \
		--python-platform x86_64-unknown-linux-gnu --generate-hashes --no-annotate --no-header \
		--extra dev --extra docs --constraint constraints.txt pyproject.toml --output-file build/lock
	(echo "$(LOCK_HEAD)"; cat build/lock) > requirements.lock

sbom: $(VENV)/.release
	mkdir -p build
	$(BIN)/cyclonedx-py requirements requirements.lock --output-reproducible --of JSON \
		--output-file build/sbom.json

audit: $(VENV)/.release
	$(BIN)/pip-audit --require-hashes --disable-pip --no-deps --requirement requirements.lock

clean:
	rm -rf $(VENV) runs build
