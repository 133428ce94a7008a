"""What PEFT measured on a GPU, against the bytes a parameter of the course's recipes."""

import pytest

from peft_lessons.costs.estimate import GB, RECIPES
from peft_lessons.costs.evidence import benchmark


def for_one(recipe: str) -> float:
    """Return the bytes of a trainable number: weight, gradient, master copy and moments."""
    per = RECIPES[recipe]
    return per.weight + per.gradient + per.master + per.moments


def test_peft_holds_what_the_recipes_say_between_two_steps():
    runs = benchmark().set_index("run")
    frozen, outputs = 3_212_749_824 * RECIPES["float32 adapter"].frozen / GB, 0.35
    for name in ("LoRA, rank 32", "rsLoRA, rank 64", "OFT", "(IA)³, 1e-3", "AdaLoRA"):
        run = runs.loc[name]
        trained = run["trained"] * for_one("float32 adapter") / GB
        assert run["held"] == pytest.approx(frozen + trained + outputs, abs=0.01), name
    full = runs.loc["full fine-tuning, 1e-5"]
    trained = full["trained"] * for_one("pure bfloat16") / GB
    assert full["held"] == pytest.approx(trained + outputs, abs=0.02)
