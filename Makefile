# Everything runs in .venv, which the first command sets up. Nothing outside this folder changes.

PYTHON ?= python3.11
LESSON ?=
ARGS ?=

BIN := .venv/bin
READY := .venv/ready

# One kernel a core and one thread each: more threads on few cores are several times slower.
OFFLINE := TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help lab test export outputs solved browser lint clean .venv

help:  ## show this list
	@echo "make TARGET   (PYTHON=/path/to/python3.11 where it isn't found by that name)"
	@sed -n 's/^\([a-z.]*\):.*## \(.*\)/  \1	\2/p' Makefile | expand -t 12

lab: $(READY)  ## open the lessons in JupyterLab
	@cd notebooks && ../$(BIN)/python -m jupyterlab $(ARGS)

test: $(READY)  ## run all tests and every lesson, as shipped and solved (under 15 minutes)
	@$(OFFLINE) $(BIN)/python -m pytest -q -n 2 --nbval-lax $(ARGS) tests notebooks

.venv: $(READY)  ## set up the environment, where it is missing or out of date

export: $(READY)  ## write the lessons' exported cells to peft_lessons/methods/
	@$(OFFLINE) $(BIN)/python -m tools.notebooks export $(LESSON)

outputs: $(READY)  ## execute the lessons and store clean outputs; one with LESSON=02
	@$(OFFLINE) $(BIN)/python -m tools.notebooks outputs $(LESSON)

solved: $(READY)  ## run the lessons with the solutions, checks strict; one with LESSON=02
	@$(OFFLINE) $(BIN)/python -m tools.notebooks solved $(LESSON)

browser: $(READY)  ## try a lesson in JupyterLab with a real browser (needs Chromium)
	@$(OFFLINE) $(BIN)/python -m pytest -q -rs $(ARGS) tests/test_browser.py

lint: $(READY)  ## check the style of all Python code
	@$(BIN)/ruff check .

clean:  ## remove caches; the environment stays
	@rm -rf .pytest_cache .ruff_cache build *.egg-info notebooks/.ipynb_checkpoints
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# The stamp comes last, so that a set-up cut short begins anew; a newer pyproject.toml updates.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	  echo "The course needs Python 3.11, and '$(PYTHON)' isn't it. Install it, or name it:"; \
	  echo "  make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Setting up .venv with PyTorch, JupyterLab and the rest: once, 2 to 10 minutes."
	@test -f $@ || { rm -rf .venv && $(PYTHON) -m venv .venv; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@
