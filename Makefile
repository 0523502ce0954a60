# Two commands on a fresh machine with Python 3.11 or later, make and a C++ compiler: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
SHELL := bash
SCHEME ?=
# Test files run side by side, each process on a core: a file stays in one process, which its engines and models serve.
JOBS ?= 2
PYTEST := pytest -m "not soak" -n $(JOBS) --dist loadfile
test test-oldest test-torchrec test-deepspeed: export OMP_NUM_THREADS = 1
# A host's process imports thousands of modules: kept compiled, they load in a quarter of the time.
export PYTHONDONTWRITEBYTECODE :=

# Real models' routing tables, where they lie beside the checkout: tests that need them skip without.
ROUTING_DATA := $(wildcard ../shared/data/moe_routing)
ifneq ($(ROUTING_DATA),)
export FORERUN_ROUTING_DATA ?= $(abspath $(ROUTING_DATA))
endif

.DEFAULT_GOAL := help
.PHONY: help setup lint types test test-oldest test-torchrec test-vllm test-sglang test-deepspeed soak soak-vllm soak-sglang demo wheel clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Make the environments, each once; seconds when nothing changed
	@$(PYTHON) tests/hosts/environments.py main sglang oldest torchrec-1.7 torchrec-1.9 vllm-0.28 sglang-0.5.18

lint: setup ## Check the code's form
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup ## Check the types
	$(BIN)/mypy

test: lint types ## Everything that CI runs: lint, types, all tests but the soak's
	$(BIN)/$(PYTEST)
	@$(MAKE) --no-print-directory test-oldest test-torchrec test-vllm test-sglang

test-oldest: setup ## The tests of what the oldest supported releases serve
	.venv-oldest/bin/$(PYTEST) tests/picard tests/adapters

# What names torchrec; the algorithms beside it are the same on every release.
TORCHREC_TESTS := $(shell grep -l torchrec tests/dlrm/test_*.py) $(wildcard tests/adapters/test_torchrec*.py)

test-torchrec: setup ## The tests of what stands on torchrec, on its oldest and its newest release
	for release in 1.7 1.9; do \
		FORERUN_TORCHREC=$$release PYTHONPATH=$(CURDIR)/.venv-torchrec-$$release \
		$(BIN)/$(PYTEST) $(TORCHREC_TESTS) || exit; \
	done

test-deepspeed: setup ## The tests of what stands on DeepSpeed, on its oldest release
	@$(PYTHON) tests/hosts/environments.py deepspeed-0.19.4
	TORCH_COMPILE_DISABLE=1 FORERUN_DEEPSPEED=0.19.4 PYTHONPATH=$(CURDIR)/.venv-deepspeed-0.19.4 \
		$(BIN)/$(PYTEST) tests/moe/test_deepspeed*.py tests/adapters/test_deepspeed*.py

VLLM_OLDEST := FORERUN_VLLM=0.28 PYTHONPATH=$(CURDIR)/.venv-vllm-0.28

test-vllm: setup ## The tests of what stands on vLLM, on its oldest release: its contracts, and chains of engines
	$(VLLM_OLDEST) $(BIN)/$(PYTEST) tests/runahead/test_vllm_cached.py tests/adapters/test_vllm.py

# SGLang's pins are not the other hosts': its tests run in an environment of its own, one server at a time.
SGLANG := SGLANG_USE_CPU_ENGINE=1 TORCH_COMPILE_DISABLE=1 OMP_NUM_THREADS=1
SGLANG_SHIMS := $(CURDIR)/tests/hosts/sglang_shims
SGLANG_NEWEST := $(SGLANG) PYTHONPATH=$(SGLANG_SHIMS)
SGLANG_OLDEST := $(SGLANG) FORERUN_SGLANG_RELEASE=0.5.18 PYTHONPATH=$(CURDIR)/.venv-sglang-0.5.18:$(SGLANG_SHIMS)
SGLANG_PYTEST := .venv-sglang/bin/pytest tests/*/test_sglang*.py

test-sglang: setup ## The tests of what stands on SGLang, in its own environment, on its oldest and its newest release
	$(SGLANG_OLDEST) $(SGLANG_PYTEST) -m "not soak"
	$(SGLANG_NEWEST) $(SGLANG_PYTEST) -m "not soak"

SOAK := --timeout 3600 --no-header -v --show-capture=no

soak: setup ## The tests at full counts, hours: tests/results/soak-*.txt (SCHEME=moe for one, without the hosts' own)
	@mkdir -p tests/results
	set -o pipefail; for scheme in $(or $(SCHEME),picard runahead moe dlrm); do \
		$(BIN)/pytest -m soak $(SOAK) tests/$$scheme 2>&1 | tee tests/results/soak-$$scheme.txt || exit; \
	done
	$(if $(SCHEME),,@$(MAKE) --no-print-directory test-deepspeed soak-vllm soak-sglang)

soak-vllm: setup
	set -o pipefail; $(VLLM_OLDEST) $(BIN)/pytest $(SOAK) tests/runahead/test_vllm*.py 2>&1 | tee tests/results/soak-vllm.txt

soak-sglang: setup
	set -o pipefail; $(SGLANG_NEWEST) $(SGLANG_PYTEST) -m soak $(SOAK) 2>&1 | tee tests/results/soak-sglang.txt
	set -o pipefail; $(SGLANG_OLDEST) $(SGLANG_PYTEST) -m soak $(SOAK) 2>&1 | tee tests/results/soak-sglang-0.5.18.txt

demo: setup ## Every drop-in beside its stock host: build/report/index.html (SCHEME=picard for one)
	$(BIN)/forerun demo $(if $(SCHEME),--scheme $(SCHEME))

wheel: setup ## Build dist/*.whl
	$(BIN)/python -m hatchling build -t wheel

clean: ## Remove what was built; the environments stay
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find adapters examples plugins tests -name __pycache__ -type d -prune -exec rm -rf {} +
