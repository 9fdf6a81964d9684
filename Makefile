# A fresh machine needs `make demo` and `make test`; each makes .venv by itself. Every target is incremental.
#   PYTHON=python3.12   which Python .venv is made with
#   TORCH=2.13.0        which torch; `present` takes this and all other packages from PYTHON, and installs nothing
#   TRITON=3.7.1        which Triton, or `newest`; `present`, the default for other TORCHes, takes what comes with torch
# All other packages are of constraints.txt's versions, which were tested with torch 2.13.0; any other TORCH ignores them.
PYTHON ?= python3
TORCH ?= 2.13.0
TRITON ?= $(if $(filter 2.13.0,$(TORCH)),3.7.1,present)
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

ifeq ($(TORCH),present)
# The path tells one environment's python3 from another's: .venv is made anew for each.
override PYTHON := $(or $(shell command -v $(PYTHON)),$(PYTHON))
endif
VENV := .venv
BIN := $(VENV)/bin
RUFF = $(if $(filter present,$(TORCH)),$(PYTHON) -m ruff,$(BIN)/ruff)
# A stamp for each choice of versions: another choice installs anew.
ENVIRONMENT := $(VENV)/made-with-$(subst /,_,$(PYTHON))-$(TORCH)
INSTALLED := $(ENVIRONMENT)-$(TRITON)
DOCS_INSTALLED := $(INSTALLED)$(if $(filter-out present,$(TORCH)),-docs)
CONSTRAINTS := $(if $(filter 2.13.0,$(TORCH)),constraints.txt)
PIP_INSTALL = $(BIN)/python -m pip install -q $(addprefix -c ,$(CONSTRAINTS))
SOURCES := $(shell find llama_kernels reference bench -name '*.py')

.PHONY: install demo examples test test-present test-compiled bench newest gpu-check test-all fuzz fuzz-models witness matrix \
	transformers codegen lint typecheck fmt quick docs clean

install: $(INSTALLED)

ifeq ($(TORCH),present)
ifneq ($(TRITON),present)
$(error TORCH=present installs nothing, so it takes TRITON=present only, not TRITON=$(TRITON))
endif

$(INSTALLED): tools/link_environment.py
	$(PYTHON) tools/link_environment.py $(VENV)
	@$(BIN)/python tools/packages.py --python $(PYTHON)
	touch $@

# $(call NEEDS,demo): stops where a package that `make demo` needs is missing.
NEEDS = @$(BIN)/python tools/packages.py $(1) --python $(PYTHON)
else
$(ENVIRONMENT):
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch==$(TORCH)
	touch $@

# The interpreter of Triton 3.6 does not work with numpy 2.4.
$(INSTALLED): $(ENVIRONMENT) pyproject.toml $(CONSTRAINTS)
	rm -f $(ENVIRONMENT)-*
	$(PIP_INSTALL) -e '.[test,bench,examples]' $(if $(filter present 3.6.%,$(TRITON)),'numpy<2.4')
ifeq ($(TRITON),newest)
	$(PIP_INSTALL) --upgrade triton
else ifneq ($(TRITON),present)
	$(PIP_INSTALL) triton==$(TRITON)
endif
	touch $@
endif

# DEMO='--steps 50' and the like; `python -m examples.demo --help` has all of it.
demo: $(INSTALLED)
	$(call NEEDS,demo)
	$(BIN)/python -m examples.demo $(DEMO)

# Each side by side, stock and patched, half as long as its default; pictures and numbers in build/examples.
TASKS := sequence-classification token-classification question-answering
EXAMPLES ?= $(TASKS) pretrain generate
STEPS ?= 120
script = $(if $(filter $(TASKS),$(1)),finetune --task $(1),$(1))

examples: $(INSTALLED)
	$(call NEEDS,examples)
	@set -ex; $(foreach name,$(EXAMPLES),$(BIN)/python -m examples.$(call script,$(name)) --compare --steps $(STEPS);)

# The kernels (compiled on a GPU, else in Triton's interpreter), then what CPU tensors run: tests/run.py.
# PYTEST='tests/ops/test_rope.py -k heads' and the like choose tests.
test: lint codegen $(if $(filter-out present,$(TORCH)),build/kernels)
	$(call NEEDS,test)
	$(BIN)/python -m tests.run --workers $(JOBS) $(PYTEST)

# The package `kernels` of Hugging Face, for one test. Aside, since Transformers behaves differently where it is installed.
build/kernels: $(INSTALLED)
	rm -rf $@
	$(BIN)/python -m pip install -q --no-deps --target $@ kernels==0.17.2
	touch $@

# `make` with TORCH=present on a machine made for it: a virtual environment in another one, without a network.
test-present: $(INSTALLED)
	$(BIN)/python -m tests.installation.present_environment

# The suite with the newest release of every package, in an environment of its own; each run upgrades it.
# TRANSFORMERS=git+https://github.com/huggingface/transformers tests the main branch of Transformers.
TRANSFORMERS ?= transformers
newest: BIN := .venv-newest/bin
newest:
	$(PYTHON) -m venv .venv-newest
	$(BIN)/python -m pip install -q --upgrade --upgrade-strategy eager torch $(TRANSFORMERS) -e '.[test,bench,examples]'
	$(BIN)/python -m pip install -q --upgrade triton
	$(BIN)/python -m pip freeze
	$(BIN)/python -m tests.run --workers $(JOBS) $(PYTEST)

# On a GPU every provider is measured. Without one: bounds on times, parity, machine code and the host's cost of a call.
# BENCH='--preset sweeps --ops rope' and the like; `python -m bench run --help` lists the options.
bench: $(INSTALLED)
	$(call NEEDS,bench)
	$(BIN)/python -m bench run $(BENCH)

# GPU_CHECK='--workers 4' and the like.
gpu-check: $(INSTALLED)
	$(call NEEDS,gpu-check)
	$(BIN)/python -m bench.gpu_check $(GPU_CHECK)

# More than CI has time for.
MINUTES ?= 10
test-all: test fuzz

# Random calls of everything; a failure is shrunk to a line for tests/regressions/reproducers.txt.
fuzz: $(INSTALLED)
	$(call NEEDS,fuzz)
	$(BIN)/python -m tests.regressions.fuzz --minutes $(MINUTES)

# Random configs and calls of patched Hugging Face models: CASES of each test.
CASES ?= 1000
fuzz-models: $(INSTALLED)
	$(call NEEDS,test)
	CASES=$(CASES) TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/integrations/test_random_models.py

# What the compiler makes of the kernels, run without a GPU (tests/compiled/README.md): all calls, of which `test` has some.
test-compiled: $(INSTALLED)
	$(call NEEDS,test)
	CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=0 $(BIN)/python -m pytest -n $(JOBS) --compiled-table tests/compiled

# Others' suites against our ops: WITNESS=flash_attention SUITE=path/to/checkout (docs/reliability.md).
WITNESS ?= flash_attention
witness: $(INSTALLED)
	$(if $(filter present,$(TORCH)),,$(PIP_INSTALL) einops)
	$(call NEEDS,witness)
	SUITE=$(SUITE) $(BIN)/python -m pytest -o addopts= -q tests/regressions/witness/$(WITNESS).py

# Import, interpreter and compiler under each torch with each Triton: an environment a pair, so some gigabytes.
matrix: $(INSTALLED)
	$(BIN)/python -m tests.installation.matrix

# tests/integrations with each minor release of Transformers from 4.57 on, or with RELEASES='5.3.0 5.10.4' and the like.
transformers: $(INSTALLED)
	$(call NEEDS,test)
	$(BIN)/python -m tests.installation.transformers_releases --workers $(JOBS) $(RELEASES)

# The compile gate. Its recorded figures are of Triton 3.6.0, by whose code most tiles were chosen, so that is installed
# aside for it: build/codegen.json has all families. With TRITON=newest the gate is of the newest release and of sm_90
# alone: build/codegen-newest.json. `python -m bench.codegen` shows the other families there; docs/lab has figures.
RECORDED := 3.6.0
REPORT := build/codegen$(if $(filter newest,$(TRITON)),-newest)
ifeq ($(TORCH),present)
codegen:
	@echo "codegen is left out: it compares with code of Triton $(RECORDED), and TORCH=present installs nothing."
else
codegen: $(REPORT).json
endif

build/codegen.json: ASIDE := build/triton-$(RECORDED)
build/codegen.json: build/triton-$(RECORDED)
build/codegen-newest.json: TARGETS := --targets sm_90

$(REPORT).json: $(INSTALLED) $(SOURCES)
	PYTHONPATH=$(ASIDE) $(BIN)/python -m bench.codegen --workers $(JOBS) $(TARGETS) --json $@ > $(REPORT).txt || \
		{ sed -n '/at fault$$/,$$p' $(REPORT).txt; rm -f $@; exit 1; }
	tail -n 1 $(REPORT).txt

build/triton-$(RECORDED): $(INSTALLED)
	rm -rf $@
	$(BIN)/python -m pip install -q --no-deps --target $@ triton==$(RECORDED)
	touch $@

lint: $(INSTALLED) typecheck
ifeq ($(TORCH),present)
	$(call NEEDS,lint) || { echo "lint is left out."; exit 0; }; $(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .
else
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
endif

# [tool.mypy] in pyproject.toml. The types of torch differ between releases: other TORCHes are not checked.
typecheck: $(INSTALLED)
ifeq ($(TORCH),present)
	$(call NEEDS,typecheck) || { echo "typecheck is left out."; exit 0; }; $(PYTHON) -m mypy
else ifeq ($(CONSTRAINTS),)
	@echo "typecheck is left out: it is for torch 2.13.0."
else
	$(BIN)/mypy
endif

fmt: $(INSTALLED)
	$(call NEEDS,fmt)
	$(RUFF) check --fix .
	$(RUFF) format .

# Under a minute: lint, and each op against float64 and eager, forward and gradients, in the interpreter.
quick: lint
	$(call NEEDS,test)
	TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -o addopts= -q tests/installation/test_check.py \
		-k 'test_the_check_passes or test_the_check_of_attention_passes'

# The site, in build/site. A warning or a broken link is an error.
docs: $(DOCS_INSTALLED)
	$(call NEEDS,docs)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

ifneq ($(TORCH),present)
$(INSTALLED)-docs: $(INSTALLED) pyproject.toml $(CONSTRAINTS)
	$(PIP_INSTALL) -e '.[docs]'
	touch $@
endif

clean:
	rm -rf $(VENV) .venv-newest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
