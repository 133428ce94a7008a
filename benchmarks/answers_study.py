"""Which test sentences each method gets right, so that any two can be compared on the same ones.

    python benchmarks/answers_study.py    # two hours on one core

Trains minilm on movie sentiment with most methods of the course, each at its best learning rate in
the other studies, with three seeds. Adds a row for each run to data/results/sentiment_answers.csv:
`right` has one bit for each test sentence, as a hexadecimal number.
"""

from additive_study import described
from catalogue import TOKENS
from common import SEEDS, base_of, fill_table, hexadecimal, load, plain, right_answers

from peft_lessons import freeze, inject

STEPS = 200
# (method, variant, width, rank or virtual tokens, learning rate) of the runs to be paired
PAIRED = (
    ("lora", "qv", 8, 3e-3),
    ("ia3", "", 0, 3e-2),
    ("prompt", "vocab", TOKENS, 3e-2),
    ("prompt", "text", TOKENS, 3e-2),
    ("prefix", "random", TOKENS, 3e-2),
    ("adapter", "pfeiffer", 16, 3e-3),
    ("lora", "qv", 1, 3e-3),
    ("adapter", "houlsby", 8, 3e-3),
    ("adapter", "parallel", 16, 3e-3),
    ("prefix", "mlp", TOKENS, 3e-3),
    ("prompt", "normal", TOKENS, 1e-1),
    ("adapter", "pfeiffer", 64, 3e-3),
    ("lora", "all-linear", 8, 1e-3),
    ("head", "", 0, 1e-2),
    ("full", "", 0, 2e-4),
    ("adapter", "pfeiffer", 16, 1e-3),
    ("dora", "all-linear", 8, 3e-3),
    ("qlora", "all-linear", 8, 1e-3),
    ("bitfit", "", 0, 3e-3),
    ("norms", "", 0, 3e-3),
    ("last", "", 2, 3e-4),
    ("sparse", "random", 8, 3e-3),
    ("sparse", "largest", 8, 3e-3),
    ("mixed", "", 8, 1e-3),
    ("adapter", "parallel, scaled", 16, 1e-3),
)
KEY = ("method", "variant", "size", "lr", "seed")


def run(method: str, variant: str, size: int, lr: float, seed: int) -> dict:
    """Train one point and return which test sentences it gets right."""
    task = load("sentiment")
    model = base_of(task.name, seed)
    if method == "head":
        freeze(model)
    elif method != "full":
        inject(model, described(task.name, method, variant, size))
    plain(model, task, STEPS, lr, seed)
    right = right_answers(model, task)
    return {"sentences": len(right), "right": hexadecimal(right)}


if __name__ == "__main__":
    points = [(*point, seed) for seed in SEEDS for point in PAIRED]
    fill_table("sentiment_answers", KEY, ("sentences", "right"), points, run)
