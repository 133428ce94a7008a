# Everything runs in .venv, which the first command sets up. Nothing outside this folder changes.

PYTHON ?= python3.11
LESSON ?=
FOLDER ?=
ARGS ?=

BIN := .venv/bin
READY := .venv/ready

# One kernel a core and one thread each: more threads on few cores are several times slower.
OFFLINE := TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help lab test export outputs solved release grade guide site results costs browser lint clean .venv

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

release: $(READY)  ## write the students' copy, without solutions, to build/peft-lessons
	@$(BIN)/python -m tools.release $(FOLDER)

grade: $(READY)  ## mark what students handed in: FOLDER=submitted
	@test -n "$(FOLDER)" || { echo "Which folder? make grade FOLDER=submitted"; exit 2; }
	@$(OFFLINE) $(BIN)/python -m tools.grade "$(FOLDER)" $(ARGS)

guide: $(READY)  ## write docs/wrong_answers.md, what the checks recognise
	@$(OFFLINE) $(BIN)/python -m tools.guide

site: $(READY)  ## build the course as web pages, to build/site/index.html
	@$(BIN)/python -m tools.site $(FOLDER)

results: $(READY)  ## run what the measured tables lack; many hours if they are empty
	@for script in benchmarks/*_study.py benchmarks/dora_analysis.py; do \
	  echo "$$script"; $(OFFLINE) $(BIN)/python $$script $(ARGS) || exit 1; done

costs: $(READY)  ## measure times and bytes anew, on an idle machine: half an hour
	@for script in benchmarks/costs.py benchmarks/choosing_costs.py benchmarks/qlora_cost.py; do \
	  echo "$$script"; $(OFFLINE) $(BIN)/python $$script || exit 1; done

browser: $(READY)  ## try all lessons in JupyterLab, and the site, in a real browser (needs Chromium)
	@$(OFFLINE) $(BIN)/python -m pytest -q -rs -m browser $(ARGS) tests/test_browser.py tests/test_site.py

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
	@echo "Setting up .venv with PyTorch, JupyterLab and the rest: once, 1 to 10 minutes."
	@test -f $@ || { rm -rf .venv && $(PYTHON) -m venv .venv; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@
