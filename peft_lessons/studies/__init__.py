"""Measured tables, and the figures of the course.

A study is a table in data/results with a row for each run, made by a script in benchmarks/. Lessons
show it next to their own live numbers: `Study` picks runs, chooses a learning rate by the
validation split and compares methods over seeds; `table` and `plots` show what is found.

Nothing here trains a model, injects a method or writes a file.
"""

# ruff: noqa: F401

from . import plots
from .bets import Bets
from .costs import against_peft, cost_table, stored_costs
from .explorer import Explorer, explore
from .growing import growing_chart
from .source import show_source
from .study import (
    Difference,
    Spread,
    Study,
    auc,
    best_lr,
    load_results,
    mean_and_range,
    paired_answers,
    paired_difference,
    paired_losses,
    pareto_front,
    provenance,
    stamp,
    student_t,
)
from .tables import Table, table
from .text import words
