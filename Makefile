# One verb for each thing that people and CI do here; `make help` lists them.
# Whatever is needed is set up on the way: an environment in .venv/, weights in the asset cache.

MODEL ?= smollm2
HOST ?= 127.0.0.1
PORT ?= 50051
ARGS ?=
BENCH ?= offline
OUT ?= out/gpu.json
# A Python >= 3.12 to build .venv with; left empty, .ci/find-python looks for one.
PYTHON ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
LOCK := .ci/requirements.lock
CLIENTS := .clients/.stamp
# The editable install of the environment compiles the native kernels in place.
NATIVE := setup.py pallas_kernels/native/build.py $(wildcard pallas_kernels/*/*.cc pallas_kernels/*/*.h)
PYTEST := $(BIN)/python -m pytest
# Workers of the default runs; a file's tests stay together, since they share services. Files go in
# the order of tests/conftest.py, and not those of most tests first.
JOBS ?= 2
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder
CODE := jaxserve pallas_kernels sharding tests bench .ci
RELEASED := proto/released/v1.binpb
# The models that are assets; any other MODEL is a path, a hub id or dummy:NAME.
EMBEDDED := $(filter smollm2 gemma3,$(MODEL))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

##@ Use

.PHONY: help
help: ## List the targets
	@awk 'BEGIN { FS = ":.*## " } /^##@/ { printf "\n%s\n", substr($$0, 5) } \
	    /^[a-z][a-z-]*:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: serve
serve: $(STAMP) ## Serve MODEL= on HOST= PORT=, with further flags in ARGS=
	@$(if $(EMBEDDED),$(BIN)/python -m jaxserve.assets $(EMBEDDED))
	@exec $(BIN)/jaxserve launch $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

.PHONY: demo
demo: $(STAMP) ## Start a server, stream one chat answer, print its timing, stop
	@$(if $(EMBEDDED),$(BIN)/python -m jaxserve.assets $(EMBEDDED))
	@exec $(BIN)/jaxserve demo $(ARGS)

.PHONY: env
env: $(STAMP) ## Build .venv from the lock

.PHONY: native
native: ## Compile the native CPU kernels in place, with CXX=
	@$(BIN)/python pallas_kernels/native/build.py --compiler "$(CXX)"

.PHONY: assets
assets: $(STAMP) ## Fetch the pinned weights, tokenizers and texts that the tests read
	@$(BIN)/python -m jaxserve.assets

##@ Check

.PHONY: test
test: $(STAMP) assets lint types layers proto-check proto-lint ## All checks, all tests but gpu, wide and prove-*
	$(PYTEST) -m "not gpu and not prove and not wide" $(PARALLEL) --durations 25 $(ARGS)

.PHONY: quick
quick: $(STAMP) ## The unmarked tests
	$(PYTEST) -m "not gpu and not slow and not prove and not wide" $(PARALLEL) $(ARGS)

.PHONY: test-gpu
test-gpu: $(STAMP) ## The tests that need an accelerator
	JAX_PLATFORMS=cuda,cpu $(PYTEST) -m gpu $(ARGS)

.PHONY: lint
lint: $(STAMP) ## ruff check, and formatting
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)

.PHONY: fmt
fmt: $(STAMP) ## Format Python and proto files, and mend what ruff can
	@$(BIN)/ruff check --fix-only $(CODE)
	@$(BIN)/ruff format $(CODE)
	@$(BIN)/buf format --write proto

.PHONY: types
types: $(STAMP) ## pyright
	@$(BIN)/pyright --pythonpath $(BIN)/python

.PHONY: layers
layers: $(STAMP) ## Who may import whom
	@$(BIN)/lint-imports --no-cache

.PHONY: bench
bench: $(STAMP) ## Run bench/BENCH=offline, serving, frontend, host or kernels, with flags in ARGS=
	$(BIN)/python -m bench.$(BENCH) $(ARGS)

.PHONY: bench-gpu
bench-gpu: $(STAMP) ## Everything that decides the speed on one GPU, under 9 minutes, into OUT=
	$(BIN)/python -m bench.gpu --out $(OUT) $(ARGS)

.PHONY: bench-gpu-dry
bench-gpu-dry: $(STAMP) ## The same with tiny sizes on the CPU, under 3 minutes
	$(BIN)/python -m bench.gpu --dry-run $(ARGS)

.PHONY: peers
peers: $(STAMP) ## Install the engines that bench-peers measures, each in its own environment: 10 GB
	@$(BIN)/python -m jaxserve.assets smollm2
	$(BIN)/python -m bench.peers.install $(ARGS)

.PHONY: bench-peers
bench-peers: $(STAMP) ## jaxserve and these engines on the same tokens, about 25 minutes, into OUT=
	$(BIN)/python -m bench.peers --out $(if $(filter file,$(origin OUT)),out/peers.json,$(OUT)) $(ARGS)

.PHONY: clients
clients: $(CLIENTS) ## Install the stock clients that tests hold against a server, in .clients: 240 MB

.PHONY: native-sanitize
native-sanitize: $(STAMP) ## The native kernels under AddressSanitizer and ThreadSanitizer, without Python
	@mkdir -p build/native
	@JAX_PLATFORMS=cpu $(BIN)/python -m tests.pallas_kernels.native_cases build/native/cases
	@for sanitizer in address,undefined thread; do \
	    program=build/native/check-$$sanitizer; \
	    $(BIN)/python pallas_kernels/native/build.py --compiler "$(CXX)" \
	        --program tests/pallas_kernels/native_check.cc --out $$program \
	        --flags="-O1 -g -fsanitize=$$sanitizer -fno-sanitize-recover=all" && \
	    echo "$$sanitizer:" && $$program build/native/cases || exit 1; \
	done

##@ The contract

.PHONY: proto
proto: $(STAMP) ## Generate jaxserve/v1, internal/v1 and third_party/ from proto/
	@$(BIN)/python .ci/protos.py

.PHONY: proto-check
proto-check: $(STAMP) ## Check that they are what proto/ generates
	@$(BIN)/python .ci/protos.py --check

.PHONY: proto-lint
proto-lint: $(STAMP) ## buf lint, and no breaking change against the last release
	@$(BIN)/buf lint proto
	@$(BIN)/buf format --diff --exit-code proto
	@$(BIN)/buf breaking proto --against $(RELEASED)

.PHONY: proto-release
proto-release: $(STAMP) ## Renew the image of the last release; needs a CHANGELOG entry
	@$(BIN)/buf build proto --output $(RELEASED)

##@ Longer proofs, run before a change is called done

# Each prove-* target goes here: `prove-NAME: $(STAMP) ## what it proves`. XLA starts a thread for
# each simulated device, which a real model on few cores feels: those on one device ask for one.
ONE_DEVICE := JAX_NUM_CPU_DEVICES=1

.PHONY: prove-agreement
prove-agreement: $(STAMP) ## SmolLM2 answers alike alone, batched, cached, chunked, preempted
	@$(BIN)/python -m jaxserve.assets smollm2
	$(ONE_DEVICE) JAXSERVE_AGREEMENT_MODEL=smollm2 $(PYTEST) tests/agreement/test_agreement.py --timeout 3600 -s $(ARGS)

.PHONY: prove-kv
prove-kv: $(STAMP) assets ## SmolLM2 over int8 pages as over bfloat16 ones; fp8 and int4 are measured
	$(ONE_DEVICE) $(BIN)/python -m bench.kv_pages $(ARGS)

.PHONY: prove-wide
prove-wide: $(STAMP) assets ## More models, meshes and formats of what `make test` has
	$(PYTEST) -m wide $(PARALLEL) --durations 10 $(ARGS)

.PHONY: prove-parity
prove-parity: $(STAMP) assets ## Gemma 3 through the engine, and the perplexity of four texts
	$(ONE_DEVICE) $(PYTEST) tests/agreement/test_references.py --timeout 3600 $(ARGS)

.PHONY: prove-long
prove-long: $(STAMP) ## The first token after 100,000, served in chunks, is that of plain numpy
	$(ONE_DEVICE) OPENBLAS_NUM_THREADS=1 $(PYTEST) tests/agreement/test_long_prompt.py -m prove -s $(ARGS)

.PHONY: prove-storm
prove-storm: $(STAMP) ## 2,000 random requests to SmolLM2 over gRPC against a small pool
	@$(BIN)/python -m jaxserve.assets smollm2
	$(ONE_DEVICE) JAXSERVE_STORM_MODEL=smollm2 JAXSERVE_STORM_OUTPUT_TOKENS=32 \
	    $(PYTEST) tests/storm -m slow -s $(ARGS)

.PHONY: prove-fuzz
prove-fuzz: $(STAMP) ## 20,000 random requests over HTTP: no 5xx, no hang, nothing left behind
	JAXSERVE_FUZZ_CASES=20000 $(PYTEST) tests/frontend/http/test_fuzz.py -s $(ARGS)

.PHONY: prove-load
prove-load: $(STAMP) ## Ten minutes of everything at once, and of clients that leave
	@$(BIN)/python -m jaxserve.assets smollm2
	$(BIN)/python -m bench.load $(ARGS)

.PHONY: prove-simulator
prove-simulator: $(STAMP) ## A million simulated steps under faults keep every invariant
	$(PYTEST) tests/simulator -m prove -s $(ARGS)

.PHONY: prove-mesh
prove-mesh: $(STAMP) ## SmolLM2 on six meshes answers as on one device; the storm on 2x2
	@$(BIN)/python -m jaxserve.assets smollm2
	$(PYTEST) tests/agreement/test_on_a_mesh.py --timeout 3600 -s -k smollm2 $(ARGS)
	JAXSERVE_STORM_MESH=2x2 $(PYTEST) tests/storm -m slow -s

.PHONY: prove-hosts
prove-hosts: $(STAMP) ## Every fault of a mesh of several hosts, with the seconds it takes
	JAXSERVE_PROVE_HOSTS=1 $(PYTEST) tests/hosts --timeout 1200 -s $(ARGS)

# Pinned: a plugin that is not JAX's own version is refused. No --require-hashes: nothing of it ships.
AOT := jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 nvidia-cuda-nvcc==13.0.88 \
    nvidia-nvvm==13.0.88 nvidia-cuda-nvdisasm==13.5.37

.aot/nvidia/cu13/bin/nvdisasm: | $(STAMP)
	@rm -rf .aot
	@$(BIN)/python -m pip install -q --no-deps --target .aot $(AOT)

.PHONY: aot
aot: .aot/nvidia/cu13/bin/nvdisasm ## Fetch what compiles for GPUs without one: 660 MB

.PHONY: prove-aot
prove-aot: aot ## Plans compiled for an H200 that is not there
	PYTHONPATH=.aot $(PYTEST) tests/planning/test_aot.py --timeout 1200 $(ARGS)

.PHONY: prove-compile
prove-compile: aot ## Every GPU kernel compiled for an H200 that is not there; ARGS=--record
	PYTHONPATH=.aot $(BIN)/python -m bench.compiled $(ARGS)
	PYTHONPATH=.aot $(BIN)/python -m bench.compiled_step

.PHONY: prove-kernels
prove-kernels: $(STAMP) ## Every GPU kernel in the interpreter, drawn anew, with races and planted faults
	$(PYTEST) tests/pallas_kernels -m prove --timeout 1800 -s $(ARGS)

##@ Upkeep

.PHONY: lock
lock: $(STAMP) ## Remake the lock from pyproject.toml, for every platform, naming no index
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.12 \
	    --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --quiet \
	    --output-file $(LOCK) $(ARGS)

.PHONY: clients-lock
clients-lock: $(STAMP) ## Remake the lock of the stock clients from .ci/clients.in
	$(BIN)/uv pip compile .ci/clients.in --universal --python-version 3.12 \
	    --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --quiet \
	    --output-file .ci/clients.lock $(ARGS)

.PHONY: wheel
wheel: $(STAMP) ## Build dist/jaxserve-*.whl
	@rm -rf build  # setuptools would pack files that were deleted since the last time
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist

.PHONY: clean
clean: ## Remove what was built, and .venv; the asset cache stays
	rm -rf pallas_kernels/native/_native.so $(VENV) $(VENV).lock .clients build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(STAMP): $(LOCK) pyproject.toml .ci/environment.py $(NATIVE)
	@python="$(PYTHON)"; \
	[ -n "$$python" ] || python=$$(sh .ci/find-python $(LOCK)) || exit 1; \
	exec "$$python" .ci/environment.py $(VENV)

$(CLIENTS): .ci/clients.lock .ci/clients.py | $(STAMP)
	@$(BIN)/python .ci/clients.py
