# A fresh machine needs `make demo` and `make test`; each makes .venv by itself. Every target is incremental.
#   PYTHON=python3.12   which Python .venv is made with
#   TORCH=2.13.0        which torch; `present` takes the one that PYTHON has
#   TRITON=3.6.0        which Triton, or `newest`; `present` takes what came with torch
# All other packages are of constraints.txt's versions, which were tested with torch 2.13.0; any other TORCH ignores them.
PYTHON ?= python3
TORCH ?= 2.13.0
TRITON ?= 3.6.0
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

VENV := .venv
BIN := $(VENV)/bin
# A stamp for each choice of versions: another choice installs anew.
ENVIRONMENT := $(VENV)/made-with-$(subst /,_,$(PYTHON))-$(TORCH)
INSTALLED := $(ENVIRONMENT)-$(TRITON)
CONSTRAINTS := $(if $(filter 2.13.0,$(TORCH)),constraints.txt)
PIP_INSTALL = $(BIN)/python -m pip install -q $(addprefix -c ,$(CONSTRAINTS))
SOURCES := $(shell find llama_kernels reference bench -name '*.py')

.PHONY: install demo examples test bench newest gpu-check test-all test-compiled fuzz witness matrix codegen lint clean

install: $(INSTALLED)

$(ENVIRONMENT):
	rm -rf $(VENV)
	$(PYTHON) -m venv $(if $(filter present,$(TORCH)),--system-site-packages) $(VENV)
	$(if $(filter present,$(TORCH)),,$(PIP_INSTALL) torch==$(TORCH))
	touch $@

$(INSTALLED): $(ENVIRONMENT) pyproject.toml $(CONSTRAINTS)
	rm -f $(ENVIRONMENT)-*
	$(PIP_INSTALL) -e '.[test,bench,examples]'
ifeq ($(TRITON),newest)
	$(PIP_INSTALL) --upgrade triton
else ifneq ($(TRITON),present)
	$(PIP_INSTALL) triton==$(TRITON)
endif
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m examples.demo

# Each side by side, stock and patched, half as long as its default; pictures and numbers in build/examples.
EXAMPLES := finetune_sequence_classification finetune_token_classification question_answering pretrain generate

examples: $(INSTALLED)
	for name in $(EXAMPLES); do $(BIN)/python -m examples.$$name --compare --steps 120 || exit 1; done

# The suite runs twice: the kernels (compiled on a GPU, else in Triton's interpreter), then what CPU tensors run.
define SUITE_TWICE
$(BIN)/python -m pytest -n $(JOBS)
CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=0 $(BIN)/python -m pytest -n $(JOBS)
endef

# The compile gate holds under Triton 3.6.0, whose code most tiles were chosen by, for all families; under the newest release
# for sm_90. Other versions have none.
test: lint $(if $(filter 3.6.0 newest,$(TRITON)),codegen)
	$(SUITE_TWICE)

# The suite with the newest release of every package, in an environment of its own; each run upgrades it.
# TRANSFORMERS=git+https://github.com/huggingface/transformers tests the main branch of Transformers.
TRANSFORMERS ?= transformers
newest: BIN := .venv-newest/bin
newest:
	$(PYTHON) -m venv .venv-newest
	$(BIN)/python -m pip install -q --upgrade --upgrade-strategy eager torch $(TRANSFORMERS) -e '.[test,bench,examples]'
	$(BIN)/python -m pip install -q --upgrade triton
	$(BIN)/python -m pip freeze
	$(SUITE_TWICE)

# On a GPU everyone is measured; without one, what is true without: bounds, parity, machine code, the host's cost.
# BENCH='--preset sweeps --ops rope' and the like; `python -m bench --help` has all of it.
bench: $(INSTALLED)
	$(BIN)/python -m bench run $(BENCH)

gpu-check: $(INSTALLED)
	$(BIN)/python -m bench.gpu_check

# More than CI has time for.
MINUTES ?= 10
test-all: test fuzz

# Random calls of everything; a failure is shrunk to a line of tests/reproducers.txt.
fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

# What the compiler makes of the kernels, run without a GPU (tests/compiled/README.md): all calls, of which `test` has some.
test-compiled: $(INSTALLED)
	CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=0 $(BIN)/python -m pytest -n $(JOBS) --compiled-table \
		tests/test_compiled.py tests/test_compiled_hopper.py tests/compiled

# Others' suites against our ops: WITNESS=flash_attention SUITE=path/to/checkout (docs/reliability.md).
WITNESS ?= flash_attention
witness: $(INSTALLED)
	$(BIN)/python -m pip install -q einops
	SUITE=$(SUITE) $(BIN)/python -m pytest -o addopts= -q tests/witness/$(WITNESS).py

# Import, interpreter and compiler under each torch with each Triton: an environment a pair, so some gigabytes.
matrix: $(INSTALLED)
	$(BIN)/python -m tests.matrix

# Of each Triton a file of its own: build/codegen.json is 3.6.0's, build/codegen-newest.json the newest release's, of
# sm_90 alone. What the others are there: `python -m bench.codegen`, and docs/performance.md.
REPORT := build/codegen$(if $(filter 3.6.0,$(TRITON)),,-$(TRITON))
codegen: $(REPORT).json

$(REPORT).json: $(INSTALLED) $(SOURCES)
	mkdir -p build
	$(BIN)/python -m bench.codegen --workers $(JOBS) $(if $(filter newest,$(TRITON)),--targets sm_90) --json $@ > $(REPORT).txt || \
		{ sed -n '/at fault$$/,$$p' $(REPORT).txt; rm -f $@; exit 1; }
	tail -n 1 $(REPORT).txt

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .venv-newest build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
