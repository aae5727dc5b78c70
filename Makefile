# Everything runs in .venv, made once and installed into again when pyproject.toml or Python changes. PYTHON=... chooses
# the interpreter, and pip's own PIP_* variables where packages come from.

VENV := .venv
BIN := $(VENV)/bin
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3.13 python3.12 python3.11 python3)

# Leaves the first of CANDIDATES that will do in $$python, or says what is missing and fails.
define FIND_PYTHON
will_do=; \
for python in $(CANDIDATES); do \
  version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
  found="$$python is Python $$version"; \
  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || continue; \
  "$$python" -c 'import ensurepip, venv' 2>/dev/null && { will_do=yes; break; }; \
  lacks="$$python has no venv module: install it (Debian, Ubuntu: apt-get install $${python##*/}-venv)."; \
done; \
if [ -z "$$will_do" ]; then \
  if [ -n "$$lacks" ]; then echo "$$lacks"; \
  elif [ -n "$$found" ]; then echo "$$found, and capcli needs 3.11 or newer: install one, or name it (make PYTHON=...)."; \
  else echo "No Python (tried $(CANDIDATES)): install 3.11 or newer (Debian, Ubuntu: apt-get install python3-venv)."; \
  fi >&2; \
  exit 1; \
fi
endef

.DELETE_ON_ERROR:
.PHONY: demo test test-slow test-external gpu-test gpu-bench check lint python

demo: $(VENV)/.installed
	$(BIN)/capcli caption examples/scenes --model examples/demo-model --out captions.jsonl
	@head -n 8 captions.jsonl

# A process for each core, up to four: most tests wait for processes of their own to start.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# The core: a few minutes.
test: $(VENV)/.installed-dev
	$(PYTEST) -m 'not external and not slow'

# Exports, trainings, runs that are killed again and again: the rest.
test-slow: $(VENV)/.installed-dev
	$(PYTEST) -m 'slow and not external'

# What needs other people's programs: Java (METEOR). Skipped, with the reason, where one is missing.
test-external: $(VENV)/.installed-dev
	$(PYTEST) -m external -rs

# What needs a CUDA device; skipped, with the reason, where there is none.
gpu-test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m gpu -rs

# One GPU beside batched generate(), the decode loop alone and from files: a random model of real size, a few minutes.
gpu-bench: $(VENV)/.installed-dev
	$(BIN)/python examples/measure_gpu.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

check: lint
	$(BIN)/mypy
	$(PYTEST) -m 'not external'
	$(BENCH)

# Well below batched generate() at the same captions is a fault; how far above differs too much from machine to machine to hold.
# 200 scenes, for 24 take less time than decoder processes to start.
BENCH := $(BIN)/python examples/scenes.py --count 200 --seed 77 build/check-scenes && \
	$(BIN)/capcli bench build/check-scenes --model examples/demo-model --dtype float32 --num-beams 4 --against batched --at-least 0.8 --quick --json

# Prints the interpreter that .venv would be made with.
python:
	@$(FIND_PYTHON); echo "$$python"

# What is left of it when the Python it was made with is gone are links to nowhere, which venv would keep.
$(BIN)/python:
	@$(FIND_PYTHON); \
	rm -f $(BIN)/python*; \
	echo "Making $(VENV) with $$python. PyTorch is large: the first installation takes some minutes."; \
	"$$python" -m venv $(VENV)

# Editable, so that a change of the sources needs no new installation.
$(VENV)/.installed: pyproject.toml $(BIN)/python
	$(BIN)/python -m pip install --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(BIN)/python
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $@ $(VENV)/.installed
