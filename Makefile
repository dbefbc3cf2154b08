# make demo   set up everything in .venv, then train, reload and merge on real text (under 4 minutes on 2 CPU cores)
# make test   set up everything in .venv, then run the tests
# make static compile every shipped Triton configuration without a GPU and check the machine code (an hour on one core);
#             STATIC="--target sm_90 --dtype bf16 --each" narrows it
# make scaleout  training on 1, 2 and 4 processes (DDP, FSDP2, checkpointing): a table of how far apart the results are
# make faults kill -9 a training run at 50 random moments; make faults KILLS=200 for more, SEED=1 for others
# make fuzz   bad input by the thousand (FUZZ=20 times CI's examples); make soak   2,000 training steps hold memory flat
# make lint   style checks, types and the site   make docs   build the site of docs/ into build/docs (warnings are errors)
# make clean  remove .venv and build products
# make compat the same tests with the oldest and newest versions that are supported, each in an environment of its own
#             (COMPAT="oldest bare" chooses); make coverage the share of lines that the tests run
# make lock   record this environment's versions for CI, and the licences of the dependencies; make audit asks for known
#             vulnerabilities of the recorded versions
# make memcheck   on a machine with an NVIDIA GPU and the CUDA toolkit: the GPU tests under compute-sanitizer
#
# PYTHON    interpreter to start from, >= 3.10 (default python3)
# TORCH     what to install as torch; by default a CPU build where no NVIDIA GPU is found
# LOCK      exact versions of everything else, recorded for CI's Python; LOCK= takes the newest that pyproject.toml allows,
#           as any other Python does

PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
VERSION_OF_PYTHON := $(shell $(PYTHON) -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null)
LOCK ?= $(wildcard requirements/ci-python$(VERSION_OF_PYTHON).lock)
LOCKED := $(if $(LOCK),-c $(LOCK))
VENV := .venv
BIN := $(VENV)/bin
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test static faults scaleout fuzz soak lint docs compat coverage lock audit memcheck clean setup
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/python -m ept.demo --output runs/demo

# Triton decides at its first import whether it interprets kernels: the interpreter's tests are a run of their own.
# worksteal: each worker takes a run of neighbours, which share what a module sets up (a training, a build).
test: setup
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/triton_interpreter
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --ignore=tests/triton_interpreter

# Out-of-bounds accesses, then races, then reads of memory that nobody wrote (without torch's caching allocator, which
# would hide the first); a tool that finds something exits with 99.
memcheck: setup
	for tool in memcheck racecheck initcheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 99 \
	    $(BIN)/python -m pytest tests/gpu/test_accuracy.py tests/gpu/test_fold.py -k "small or determinism" -p no:cacheprovider || exit 1; \
	done

static: setup
	$(BIN)/python tests/triton_static/report.py --output runs/static.csv $(STATIC)

KILLS ?= 50
SEED ?= 0
faults: setup
	OMP_NUM_THREADS=1 EPT_KILLS=$(KILLS) EPT_KILL_SEED=$(SEED) $(BIN)/python -m pytest -n 0 tests/faults/test_kills.py

scaleout: setup
	$(BIN)/python tests/distributed/matrix.py $(SCALEOUT)

# Every fuzzing test with FUZZ times its examples; the counts are printed at the end.
FUZZ ?= 20
fuzz: setup
	OMP_NUM_THREADS=1 EPT_SLOW_TESTS=1 EPT_FUZZ_FACTOR=$(FUZZ) $(BIN)/python -m pytest tests/fuzzing

soak: setup
	OMP_NUM_THREADS=1 EPT_SOAK_STEPS=2000 $(BIN)/python -m pytest tests/fuzzing/test_soak.py

lint: docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The variable silences an announcement of the theme's authors.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

compat: setup
	$(BIN)/python tests/compat/matrix.py $(COMPAT)

# The C++ sources are not counted, nor kernels that only a GPU runs.
coverage: setup
	$(BIN)/python -m pip install -q $(LOCKED) pytest-cov
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TRITON_INTERPRET=1 \
	  $(BIN)/python -m pytest -q -n 2 --dist worksteal --cov=ept --cov=ept_kernels --cov-report= tests/triton_interpreter
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --cov=ept --cov=ept_kernels --cov-append --ignore=tests/triton_interpreter

lock: setup
	$(BIN)/python requirements/dependencies.py lock > requirements/ci-python$(VERSION_OF_PYTHON).lock
	$(BIN)/python requirements/dependencies.py licences > docs/licences.md

# Strict: a version that the service does not know is an error, where plain pip-audit says "no known vulnerabilities".
audit: setup
	$(BIN)/python -m pip install -q pip-audit
	$(BIN)/pip-audit --strict --no-deps --disable-pip -r requirements/ci-python$(VERSION_OF_PYTHON).lock

setup: $(VENV)/installed

$(VENV)/python-ready:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) must be Python >= 3.10 (make PYTHON=... names another)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=24" "setuptools>=77"
	@touch $@

# A CPU wheel of torch is labelled +cpu and lives outside PyPI: taken from wherever pip is set up to look, else through
# uv, which knows where PyTorch keeps it; PyPI's CUDA build works on a CPU too and is the last resort.
$(VENV)/torch-ready: $(VENV)/python-ready
ifdef TORCH
	$(BIN)/python -m pip install -q "$(TORCH)"
else ifeq ($(HAS_GPU),yes)
	$(BIN)/python -m pip install -q "torch>=2.6"
else
	$(BIN)/python -m pip install -q "torch==$(TORCH_VERSION)+cpu" 2>/dev/null \
	  || { $(BIN)/python -m pip install -q uv && $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend cpu "torch==$(TORCH_VERSION)"; } \
	  || $(BIN)/python -m pip install -q "torch==$(TORCH_VERSION)"
endif
	@touch $@

# Without build isolation the versions are those of the lock. The CUDA kernels take minutes to compile and are left out
# where there is no GPU to run them.
$(VENV)/installed: $(VENV)/torch-ready pyproject.toml setup.py $(LOCK) CMakeLists.txt $(wildcard csrc/*.cpp csrc/c*/*)
	$(BIN)/python -m pip install -q $(LOCKED) "pybind11>=2.12" "cmake>=3.22" ninja
	EPT_BUILD_CUDA=$${EPT_BUILD_CUDA-$(if $(HAS_GPU),,0)} $(BIN)/python -m pip install -q $(LOCKED) --no-build-isolation -e ".[test,docs]"
	@touch $@

clean:
	rm -rf $(VENV) build dist runs ./*.egg-info
