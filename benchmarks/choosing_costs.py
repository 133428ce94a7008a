"""What the methods of choosing_study.py cost, in the sizes that they have there.

    python benchmarks/choosing_costs.py        # ten minutes on one core, else idle

The rows of data/results/choosing_costs.csv have the columns of costs.csv, measured in the same way.
"""

from catalogue import BASES
from choosing_study import RATES, build
from common import STEPS, Benchmark, main
from costs import COLUMNS, KEY, costs_of

MERGED = ("lora", "lora, all linear", "dora, all linear", "adalora", "ia3")


def run(base: str) -> list[dict]:
    """Measure all methods of the study on a base."""
    task = next(task for task, name in BASES.items() if name == base)
    names = [method for method in RATES[task] if method != "base"]
    models = {(name, "ours"): build(task, name, STEPS[task], seed=0) for name in names}
    return costs_of(base, models, MERGED)


if __name__ == "__main__":
    main(Benchmark("choosing_costs", KEY, COLUMNS, [(base,) for base in BASES.values()], run, True))
