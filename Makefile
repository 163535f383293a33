# Two commands on a fresh machine: `make demo` and `make test`. Both install what they need into .venv.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= $(shell $(PYTHON) -c "import os; print((os.cpu_count() or 1) + 1)")
# The demonstration and the tests start hundreds of Pythons: without bytecode, each would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check slow docs chaos clean

.venv/package: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

.venv/installed: .venv/package
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# The library version that ran on the card whose measurements tests/test_rtx3060.py holds the virtual GPU against.
.venv/transformers-4.51: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@.part \
		transformers==4.51.3 tokenizers==0.21.4 huggingface-hub==0.36.0
	rm -rf $@ && mv $@.part $@ && touch $@

demo: .venv/package
	$(BIN)/python benchmarks/demo.py

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The three side by side, and the suite in one process more than there are processors: tests that wait leave them idle.
test: .venv/installed .venv/transformers-4.51
	$(MAKE) --no-print-directory --jobs 3 check suite memory

.PHONY: suite memory dist
suite: .venv/installed .venv/transformers-4.51
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

# Memory of the trainer and of three scripts, against memory.lock.toml; `tightfit check --update` writes that.
memory: .venv/installed
	$(BIN)/tightfit check memory.toml

dist: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

slow: .venv/installed
	$(BIN)/pytest -m slow -o faulthandler_timeout=3600

# An attack on training and preparing, with the seed 0: kills, signals, errors of the disk, small disks, limits, bits.
MINUTES ?= 10
chaos: .venv/installed
	$(BIN)/python benchmarks/recovery/chaos.py --minutes $(MINUTES) --seed 0

docs: .venv/installed
	@! grep -q PLACEHOLDER docs/demo.txt || { echo "docs/demo.txt is a placeholder: make demo > docs/demo.txt"; exit 1; }
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo build/site/index.html

clean:
	rm -rf .venv out out-* data build/site
