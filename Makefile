# Two commands on a fresh machine: `make demo` and `make test`. Both first make .venv with the pinned dependencies.
# With PYTHON_BIN=/path/to/python, one that has the dependencies already, nothing is installed and no network is needed.

PYTHON ?= python3
SEED ?= 0
RUNS ?= runs
DTYPE ?= fp32
BIN := .venv/bin
PYTHON_BIN :=
RUN = $(or $(PYTHON_BIN),$(BIN)/python)

.PHONY: install demo demo-rm demo-dpo test test-all lint clean

install: $(if $(PYTHON_BIN),,.venv/installed)

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	-$(BIN)/python -m minirlhf.kernels
	touch $@

# `make demo QUICK=1` runs the same commands for a few steps: it shows that they work, not what they can do.
ifdef QUICK
PRETRAIN_ARGS := --steps 30
SFT_ARGS := --steps 30
RM_ARGS := --steps 20
PPO_ARGS := --steps 3
DPO_ARGS := --steps 10
EVALUATE_ARGS := --n 32
else
PRETRAIN_ARGS :=
SFT_ARGS :=
RM_ARGS :=
PPO_ARGS :=
DPO_ARGS :=
EVALUATE_ARGS :=
endif

# Each command is printed before it runs, so that you can run it alone afterwards.
demo: install
	$(RUN) train_sft.py --data helpdesk:corpus --lr 4e-3 $(PRETRAIN_ARGS) --out $(RUNS)/pretrain --dtype $(DTYPE) --seed $(SEED) --overwrite
	$(RUN) train_sft.py --init $(RUNS)/pretrain $(SFT_ARGS) --out $(RUNS)/sft --dtype $(DTYPE) --seed $(SEED) --overwrite
	$(MAKE) --no-print-directory -j2 demo-rm demo-dpo
	@cat $(RUNS)/dpo.log
	$(RUN) train_ppo.py --init $(RUNS)/sft --reward $(RUNS)/rm $(PPO_ARGS) --out $(RUNS)/ppo --dtype $(DTYPE) --seed $(SEED) --overwrite
	$(RUN) -m minirlhf.evaluate $(RUNS)/ppo $(RUNS)/dpo --baseline $(RUNS)/sft --reward $(RUNS)/rm $(EVALUATE_ARGS) --out $(RUNS)/report --seed $(SEED)

# The reward model and DPO both start from the SFT model and need nothing of each other. Small tensors keep two threads
# busy for two thirds of the time only, so these two train side by side, each on half the cores.
CORES := len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
HALF = $(shell $(RUN) -c 'import os; print(max(1, ($(CORES)) // 2))')

demo-rm: install
	OMP_NUM_THREADS=$(HALF) $(RUN) train_rm.py --init $(RUNS)/sft $(RM_ARGS) --out $(RUNS)/rm --dtype $(DTYPE) --seed $(SEED) --overwrite

demo-dpo: install
	@mkdir -p $(RUNS)
	OMP_NUM_THREADS=$(HALF) $(RUN) train_dpo.py --init $(RUNS)/sft $(DPO_ARGS) --out $(RUNS)/dpo --dtype $(DTYPE) --seed $(SEED) --overwrite > $(RUNS)/dpo.log 2>&1 || { cat $(RUNS)/dpo.log; exit 1; }

# A file's tests stay together, since they share what they set up. `make test-all` runs the slow ones after them:
# sanitizers, mutations, other instruction sets, torch.compile, whole experiments.
test: install
	$(RUN) -m pytest -n auto --dist loadfile -m "not slow"

test-all: test
	$(RUN) -m pytest -n auto --dist loadfile -m slow

lint: install
	@$(RUN) -c 'import ruff' 2>/dev/null || { echo "make lint needs ruff: $(RUN) -m pip install ruff" >&2; exit 2; }
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf .venv runs build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
