"""What the methods of choosing_study.py cost, in the sizes that they have there.

    python benchmarks/choosing_costs.py        # ten minutes on one core, else idle

The rows of data/results/choosing_costs.csv have the columns of costs.csv, measured in the same way.
"""

import torch
from choosing_study import RATES, build
from common import BASES, STEPS, Results
from costs import COLUMNS, add_costs

MERGED = ("lora", "lora, all linear", "dora, all linear", "adalora", "ia3")


def main() -> None:
    torch.set_num_threads(1)
    results = Results("choosing_costs", COLUMNS, anew=True)
    for task, base in BASES.items():
        names = [method for method in RATES[task] if method != "base"]
        models = {(name, "ours"): build(task, name, STEPS[task], seed=0) for name in names}
        add_costs(results, base, models, MERGED)


if __name__ == "__main__":
    main()
