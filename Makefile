# `make lab` runs `python3 course.py lab`, and so every other command: course.py has them all.
#   make outputs LESSON=02     make grade FOLDER=submitted     make test ARGS=-x
# PYTHON=/path/to/python names the interpreter for the environment in .venv.

LESSON ?=
FOLDER ?=
ARGS ?=

help .DEFAULT:
	@$(or $(PYTHON),python3) course.py $@ $(LESSON) $(if $(FOLDER),"$(FOLDER)") $(ARGS)

Makefile:;
