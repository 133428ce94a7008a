"""Lesson 01: models that train equally many parameters, each in another block."""

from classroom.questions import Run, from_lesson
from peft_lessons import LoRA, measure
from peft_lessons.engine import injected_copy
from peft_lessons.studies import plots

MIB = 2**20


def peaks(model, batch_of) -> dict[str, float]:
    """Return the peak above weights and optimiser of a step on 16 sentences, and of one on 8 while
    the gradients of 8 others wait, in MiB."""

    def backward(n):
        model(**batch_of(n)).loss.backward()

    backward(8)
    waiting = sum(p.grad.numel() * 4 for p in model.parameters() if p.grad is not None) / MIB
    second = measure.peak_bytes(lambda: backward(8)) / MIB
    model.zero_grad()
    at_once = measure.peak_bytes(lambda: backward(16)) / MIB
    model.zero_grad()
    return {"16 at once": at_once, "gradients": waiting, "8 and 8": waiting + second}


def run() -> Run:
    """Measure the activations that LoRA in one block of minilm keeps, for each of the six."""
    lesson = from_lesson("01", "models", "watch")
    batch, full = lesson["batch_of"](16), lesson["models"]["full"]

    def step(model):
        return model(**batch).loss

    whole, shares = measure.activation_bytes(full, lambda: step(full)), {}
    for block, name in enumerate("ABCDEF"):
        targets = tuple(f"layer.{block}.attention.self.{part}" for part in ("query", "value"))
        model = injected_copy(full, LoRA(rank=8, alpha=16, targets=targets)).train()
        kept = measure.activation_bytes(model, lambda model=model: step(model))
        shares[name] = 100 * kept / whole
        if name == "D":
            modules = measure.kept_by_module(model, lambda model=model: step(model))
    places = [f".layer.{block}." for block in range(6)]
    blocks = [sum(size for path, size in modules.items() if at in path) / MIB for at in places]
    fig, (left, right) = plots.figure(1, 2, size=(7.4, 2.7))
    left.bar([*shares], [*shares.values()], color=plots.COLORS[0])
    left.set(xlabel="model", ylabel="activations kept, % of full", ylim=(0, 100))
    right.bar(range(1, 7), blocks, color=plots.COLORS[1])
    right.set(xlabel="block, 1 is the lowest", ylabel="kept by this block, MiB", ylim=(0, 16))
    trainable = measure.parameters(model).trainable
    numbers = {"shares": shares, "blocks": blocks, "trainable": trainable}
    return Run(fig, numbers | {"peaks": peaks(full, lesson["batch_of"])})
