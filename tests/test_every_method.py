"""The verbs over every method, which its own tests need not go through: a new one is a row here."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from tiny import (
    MODELS,
    PLACES,
    TARGETS,
    batch_of,
    close,
    contents,
    hooks,
    interrupted,
    moved,
    refused,
    same,
    same_adapter,
    state,
    task_of,
    tiny_llama,
    tiny_opt,
)

from peft_lessons import (
    IA3,
    OFT,
    AdaLoRA,
    BitFit,
    BottleneckAdapter,
    DiffPruning,
    DoRA,
    LoftQ,
    LoRA,
    LoRAPlus,
    MixAndMatch,
    PartialFineTuning,
    PiSSA,
    Prefix,
    Prompt,
    QLoRA,
    VeRA,
    fit,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unload,
    unmerge,
)
from peft_lessons.engine import CONFIG, WEIGHTS, injection_of, registered_methods

STEPS = 8
SCHEDULE = dict(tinit=2, tfinal=3, delta=1, total_steps=STEPS)
METHODS = {  # {row: the method for a model of this name}
    "lora": lambda name: LoRA(4, 6.0, TARGETS[name], dropout=0.1),
    "dora": lambda name: DoRA(4, 6.0, TARGETS[name], dropout=0.1),
    "qlora": lambda name: QLoRA(4, 8.0, TARGETS[name]),
    "adalora": lambda name: AdaLoRA(6, 3, 10.0, TARGETS[name], **SCHEDULE),
    "houlsby": lambda name: BottleneckAdapter(6, "houlsby", "tanh", 0.5),
    "pfeiffer": lambda name: BottleneckAdapter(6, "pfeiffer", "tanh", 0.5),
    "parallel": lambda name: BottleneckAdapter(6, "parallel", "tanh", 0.5),
    "ia3": lambda name: IA3(*PLACES[name]),
    "prompt": lambda name: Prompt(6),
    "prefix": lambda name: Prefix(5),
    "prefix, mlp": lambda name: Prefix(5, projection=24),
    "bitfit": lambda name: BitFit(),
    "last block": lambda name: PartialFineTuning(last=1),
    "norms": lambda name: PartialFineTuning(patterns=r".*[Nn]orm\..*"),
    "diff": lambda name: DiffPruning(targets=TARGETS[name]),
    "diff, structured": lambda name: DiffPruning(structured=True, targets=TARGETS[name]),
    "diff, no gates": lambda name: DiffPruning(gates=False, targets=TARGETS[name]),
    "mixed": lambda name: MixAndMatch(5, 6),
    "lora+": lambda name: LoRAPlus(4, 6.0, TARGETS[name], dropout=0.1),
    "pissa": lambda name: PiSSA(4, 6.0, TARGETS[name], dropout=0.1),
    "loftq": lambda name: LoftQ(4, 8.0, TARGETS[name], iterations=2),
    "qpissa": lambda name: LoftQ(4, 8.0, TARGETS[name], iterations=0, principal=True),
    "vera": lambda name: VeRA(12, TARGETS[name], dropout=0.1, seed=5),
    "oft": lambda name: OFT(16, TARGETS[name]),
    "oft, exact": lambda name: OFT(16, TARGETS[name], neumann=False),
}
IN_4_BITS = ("qlora", "loftq", "qpissa")
NO_MERGE = (  # what no change of the weights computes, or none in 4 bits
    *IN_4_BITS,
    *("houlsby", "pfeiffer", "parallel", "prompt", "prefix", "prefix, mlp", "mixed"),
)
WIDE = {  # every width a multiple of 64, as four bits need it
    "llama": lambda: tiny_llama(intermediate_size=128),
    "opt": lambda: tiny_opt(ffn_dim=128),
}
# A Llama has no biases.
CASES = [
    (row, name)
    for row in METHODS
    for name in (WIDE if row in IN_4_BITS else MODELS)
    if (row, name) != ("bitfit", "llama")
]


def base_of(row, name):
    return (WIDE if row in IN_4_BITS else MODELS)[name]()


def test_every_method_of_the_course_has_a_row():
    course = {m for m in registered_methods() if m.__module__.startswith("peft_lessons.methods.")}
    # Two that leave a plain LoRA behind are no kinds of file, and so in no registry.
    assert {type(make("bert")) for make in METHODS.values()} == course | {LoRAPlus, PiSSA}


def fresh(row, name):
    model = base_of(row, name)
    torch.manual_seed(3)  # what the method draws
    inject(model, METHODS[row](name))
    return model


@cache
def uninterrupted(row, name):
    """(the losses of a whole run, the state after it, the state before it)."""
    model = fresh(row, name)
    before = state(model)
    history = fit(model, task_of(name), STEPS, show=False)
    return history.loss, state(model), before


@pytest.mark.parametrize("at", [2, 4, 6])
@pytest.mark.parametrize(
    ("row", "name"),
    [(row, "llama" if row in IN_4_BITS else "bert") for row in METHODS] + [("prompt", "llama")],
)
def test_an_interrupted_run_resumes_to_the_same_bits(row, name, at, tmp_path):
    """AdaLoRA's is broken off before it prunes, while it does, and when its ranks are settled."""
    losses, whole, before = uninterrupted(row, name)
    options = dict(show=False, checkpoint=tmp_path / "run.pt", checkpoint_every=at)
    with pytest.raises(KeyboardInterrupt):
        fit(fresh(row, name), interrupted(type(task_of(name)), at + 1), STEPS, **options)
    assert (tmp_path / "run.pt").exists()
    resumed = fresh(row, name)
    history = fit(resumed, task_of(name), STEPS, **options)
    assert history.loss == losses
    assert same(state(resumed), whole) and not same(whole, before)


@pytest.mark.parametrize(("row", "name"), [case for case in CASES if case[0] not in IN_4_BITS])
def test_unload_gives_the_base_back_bit_by_bit_twice(row, name):
    model, batch, method = base_of(row, name), batch_of(name), METHODS[row](name)
    before, logits = state(model), model(**batch).logits
    for _ in range(2):  # and once more, as the first time
        inject(model, method)
        assert not same(state(model), before)
        output = moved(model)(**batch)
        assert not torch.equal(output.logits[..., -1, :], logits[..., -1, :])
        output.loss.backward()
        model.zero_grad()
        with refused(model, f"holds {type(method).__name__}.* already", RuntimeError):
            inject(model, method)
        assert unload(model) is model and injection_of(model) is None
        assert same(state(model), before) and not hooks(model)
        assert torch.equal(model(**batch).logits, logits)


@pytest.mark.parametrize(("row", "name"), CASES)
def test_merged_it_computes_the_same_or_is_refused(row, name):
    model, batch = moved(fresh(row, name)), batch_of(name)
    before, logits = state(model), model(**batch).logits
    if row in NO_MERGE:
        with pytest.raises(TypeError, match="merge"):
            merge(model)
        assert same(state(model), before) and torch.equal(model(**batch).logits, logits)
    else:
        merge(model)
        close(model(**batch).logits, logits, 5e-6)
        unmerge(model)
        close(model(**batch).logits, logits, 5e-6)


def as_loaded(method):
    """What a file says of a method: it holds what was made, not what made it."""
    if isinstance(method, LoRAPlus):
        return LoRA(method.rank, method.alpha, method.targets, method.dropout)
    if isinstance(method, PiSSA):
        return LoRA(2 * method.rank, 2 * method.alpha, method.targets, method.dropout)
    if isinstance(method, Prefix):
        return replace(method, projection=None)
    return replace(method, gates=False) if isinstance(method, DiffPruning) else method


@pytest.mark.parametrize(("row", "name"), CASES)
def test_files_there_and_back_are_equal(row, name, tmp_path):
    model, batch, method = base_of(row, name), batch_of(name), METHODS[row](name)
    plain = model(**batch).logits
    inject(model, method)
    save_adapter(moved(model), tmp_path)
    assert set(contents(tmp_path)) == {CONFIG, WEIGHTS}
    again = base_of(row, name)
    load_adapter(again, tmp_path)
    assert injection_of(again).method == as_loaded(method)
    assert not any(p.requires_grad for p in again.parameters())
    got, expected = again(**batch).logits, model(**batch).logits
    # Of an MLP the product is made once, and not for each row of the batch; of PiSSA's two branches
    # one of twice the rank.
    if row in ("prefix, mlp", "pissa"):
        close(got, expected, 5e-6)
    else:
        assert torch.equal(got, expected)
    assert not torch.equal(got[..., -1, :], plain[..., -1, :])
    save_adapter(again, tmp_path / "again")
    assert same_adapter(tmp_path / "again", tmp_path)
