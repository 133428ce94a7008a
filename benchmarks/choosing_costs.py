"""What the methods of choosing_study.py cost, in the sizes that they have there.

    python benchmarks/choosing_costs.py        # ten minutes on one core, else idle

The rows of data/results/choosing_costs.csv have the columns of costs.csv, measured in the same way.
"""

from choosing_study import RATES, build
from common import STEPS, fill_table
from costs import COLUMNS, KEY, TASKS, costs_of

MERGED = ("lora", "lora, all linear", "dora, all linear", "adalora", "ia3")


def run(base: str) -> list[dict]:
    """Measure all methods of the study on a base."""
    task = TASKS[base]
    names = [method for method in RATES[task] if method != "base"]
    models = {(name, "ours"): build(task, name, STEPS[task], seed=0) for name in names}
    return costs_of(base, models, MERGED)


if __name__ == "__main__":
    fill_table("choosing_costs", KEY, COLUMNS, [(base,) for base in TASKS], run, anew=True)
