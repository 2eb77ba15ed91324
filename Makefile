# Every target makes the virtual environment if it is missing. The quickstarts need the runtime alone; tests and lint add
# the developers' tools.
VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
RUN ?= runs/quickstart
# How many tests run at once, each on one thread: one a core, at most 8, because each worker loads torch.
JOBS ?= logical --maxprocesses 8
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

.PHONY: quickstart quickstart-controllable paper-mini test test-slow test-oldest conformance lint format bench dist peft-patch clean check-venv

check-venv:
	@$(PYTHON) .ci/check_venv.py $(VENV)

$(VENV)/.runtime: pyproject.toml $(CONSTRAINTS) | check-venv
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON): expected Python 3.11 or newer, as in: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes, a few GB the first time)"
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed: $(VENV)/.runtime | check-venv
	@echo "Installing the developers' tools into $(VENV)"
	@$(INSTALL) --editable '.[dev]'
	@touch $@

# Five photos of a mug -> an ETHER+ adapter -> images and scores, in minutes on two CPU cores. A second call resumes.
# One process on the CPU needs no `accelerate launch`, which takes seconds to start.
quickstart: $(VENV)/.runtime
	ACCELERATE_USE_CPU=true $(BIN)/python train_dreambooth.py \
	    --config configs/quickstart/dreambooth.yaml output_dir=$(RUN) training.resume=true
	$(BIN)/ether-diffusion evaluate $(RUN)

# Rendered scenes with label maps -> an encoder and an ETHER+ adapter -> images from maps, side by side, and their mIoU.
quickstart-controllable: $(VENV)/.runtime
	ACCELERATE_USE_CPU=true $(BIN)/python train_controllable.py \
	    --config configs/quickstart/controllable.yaml output_dir=$(RUN)_controllable training.resume=true
	$(BIN)/ether-diffusion evaluate $(RUN)_controllable

# The paper's tables and figures in small, and which of its claims hold here: docs/miniature-paper.md, in about 75 minutes
# on two cores. QUICK=1: in 15 minutes, into runs/paper_mini_quick, to check that everything runs. A second call resumes.
paper-mini: $(VENV)/.installed
	$(BIN)/python eval/paper_mini.py $(if $(QUICK),--quick)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow"

# The quick tests with the oldest versions that pyproject.toml allows, in an environment of their own.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# The conformance tests are PEFT's own, from its source distribution, which pip downloads once.
test-slow: conformance
	$(BIN)/python -m pytest -n $(JOBS) -m slow

conformance: $(VENV)/.installed
	$(BIN)/python tests/conformance/run.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	PYTHONPATH=eval $(BIN)/lint-imports
	$(BIN)/python tests/laws.py

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/training_step.py

# The source distribution and the wheel in dist/, their metadata checked; then the wheel is installed into a new
# environment, with all that it needs (a few GB), and its commands are run there.
dist:
	$(PYTHON) tools/make_dist.py --constraints $(CONSTRAINTS)

# ETHER as a patch against the installed release of PEFT, in dist/.
peft-patch: $(VENV)/.installed
	$(BIN)/python tools/peft_patch.py

# Keeps runs/, which holds what you trained.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
