"""Compare AdaLoRA with Hugging Face PEFT: every number of a training, and its files.

Operations and their order are PEFT's, so a training of 20 steps is equal to the last bit. What is
asserted is 1e-6 and equal masks, so that another machine's kernels may differ.
"""

import json
from copy import deepcopy
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    TinyText,
    close,
    contents,
    perturb,
    read_config,
    refused,
    rewrite,
    same,
    same_adapter,
    state,
    tiny_llama,
)
from torch import nn

from peft_lessons import AdaLoRA, DoRA, fit, inject, load_adapter, merge, save_adapter
from peft_lessons.engine import CONFIG, WEIGHTS, injection_of
from peft_lessons.methods.adalora import PARTS, RankAllocator, budget_after, ranks

pytestmark = pytest.mark.filterwarnings(
    # Not so: PEFT takes AdaLoRA's pattern for LoRA's, whose keys are layers, and reads it later.
    "ignore:The following rank_pattern keys did not match:RuntimeWarning"
)

Q_PROJ = "model.layers.0.self_attn.q_proj"
TARGETS, STEPS = ("q_proj", "v_proj", "down_proj"), 20
SCHEDULE = dict(tinit=3, tfinal=5, delta=2, total_steps=STEPS)
METHOD = AdaLoRA(initial_rank=6, target_rank=3, alpha=10, targets=TARGETS, **SCHEDULE)


def theirs_on(base, targets=TARGETS, task_type="CAUSAL_LM", **changes):
    settings = dict(init_r=6, target_r=3, lora_alpha=10, tinit=3, tfinal=5, deltaT=2)
    settings |= dict(total_step=STEPS, target_modules=list(targets), task_type=task_type)
    return peft.get_peft_model(deepcopy(base), peft.AdaLoraConfig(**(settings | changes)))


def layers_of(theirs):
    modules = theirs.base_model.model.named_modules()
    return {name: m for name, m in modules if hasattr(m, "lora_E")}


def branches_of(ours):
    return {path: w.ada for path, w in injection_of(ours).wrappers.items()}


def parts_of(theirs, ours):
    """Yield (PEFT's, ours) of all A, E and B."""
    branches = branches_of(ours)
    assert list(branches) == list(layers_of(theirs))
    for path, layer in layers_of(theirs).items():
        for part in PARTS:
            yield getattr(layer, part)["default"], getattr(branches[path], part)


@torch.no_grad()
def copy_values(theirs, ours):
    for a, b in parts_of(theirs, ours):
        b.copy_(a)


def pair(base, method=METHOD, **changes):
    torch.manual_seed(7)
    theirs, ours = theirs_on(base, **changes), deepcopy(base)
    inject(ours, method)
    copy_values(theirs, ours)
    return theirs, ours


def pattern_of(theirs):
    pattern = theirs.peft_config["default"].rank_pattern
    return {n.removesuffix(".default").removesuffix(".lora_E"): f for n, f in pattern.items()}


def trains(model):
    return [p for p in model.parameters() if p.requires_grad]


def trained_pair(base, method=METHOD, **changes):
    """Return both with the same values, as after training."""
    theirs, ours = pair(base, method, **changes)
    perturb(ours, 0.3)
    with torch.no_grad():
        for a, b in parts_of(theirs, ours):
            a.copy_(b)
    return theirs, ours


def steps_of(theirs, ours=None, steps=STEPS):
    """Train PEFT's model, and ours if there is one, and yield (step, the losses) after each."""
    both = [m for m in (theirs, ours) if m is not None]
    optimizers = [torch.optim.AdamW(trains(m), lr=5e-3) for m in both]
    for step, batch in zip(range(1, steps + 1), TinyText().stream(8, seed=0), strict=False):
        losses = []
        for model, optimizer in zip(both, optimizers, strict=True):
            loss = model(**batch).loss
            if model is ours:
                injection = injection_of(ours)
                loss = loss + injection.method.penalty(injection)
            loss.backward()
            optimizer.step()
            if model is ours:
                injection.method.after_step(injection, step)
            else:
                theirs.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            losses.append(loss.item())
        yield step, losses


def ids_of(seed=3):
    return torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ the training


@pytest.mark.parametrize(("tinit", "tfinal", "delta"), [(3, 5, 2), (0, 0, 1), (3, 5, 50)])
def test_twenty_steps_equal_those_of_peft(tinit, tfinal, delta):
    method = AdaLoRA(6, 3, 10.0, TARGETS, tinit, tfinal, delta, STEPS, beta1=0.8, beta2=0.9)
    changes = dict(tinit=tinit, tfinal=tfinal, deltaT=delta, beta1=0.8, beta2=0.9)
    theirs, ours = pair(tiny_llama(), method, **changes)
    history = fit(ours, TinyText(), STEPS, lr=5e-3, batch_size=8, clip=None, show=False)
    optimizer = torch.optim.AdamW(trains(theirs.train()), lr=5e-3, weight_decay=0.0, fused=True)
    for step, batch in zip(range(STEPS), TinyText().stream(8, seed=0), strict=False):
        optimizer.param_groups[0]["lr"] = history.lr[step]
        loss = theirs(**batch).loss
        loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
        assert abs(loss.item() - history.loss[step]) <= 1e-6, step
    for a, b in parts_of(theirs, ours):
        assert (a - b).abs().max() <= 1e-6 and torch.equal(a == 0, b == 0)
    masks = {path: ada.mask.tolist() for path, ada in branches_of(ours).items()}
    assert masks == pattern_of(theirs)
    assert sum(map(sum, masks.values())) == 3 * len(masks) == sum(ranks(ours).values())


def test_the_budget_is_that_of_peft_at_every_step():
    theirs = theirs_on(tiny_llama(), total_step=300, tinit=20, tfinal=50)
    allocator = theirs.base_model.rankallocator
    method = AdaLoRA(6, 3, 10.0, TARGETS, 20, 50, 2, 300)
    expected = [allocator.budget_schedule(step)[0] for step in range(1, method.end + 1)]
    got = [budget_after(step, method, 6) for step in range(1, method.end + 1)]
    assert got == expected
    assert got[:20] == [36] * 20 and got[20] == 35 and got[-1] == 18


def test_the_penalty_is_the_mean_of_the_norms():
    ours = tiny_llama()
    inject(ours, METHOD)
    perturb(ours, 0.3)
    branches = branches_of(ours).values()
    grams = [g for a in branches for g in (a.lora_A @ a.lora_A.T, a.lora_B.T @ a.lora_B)]
    mean = sum(torch.dist(g, torch.eye(6)) for g in grams) / 12
    torch.testing.assert_close(METHOD.penalty(injection_of(ours)), 0.5 * mean)


def test_gradients_cleared_too_early_are_noticed():
    ours = tiny_llama()
    inject(ours, METHOD)
    with pytest.raises(RuntimeError, match="before zero_grad"):
        METHOD.after_step(injection_of(ours), 1)


class WithUnused(nn.Module):
    """Hold a language model and a layer that its forward never calls."""

    def __init__(self):
        super().__init__()
        self.lm, self.unused = tiny_llama(), nn.Linear(64, 64)

    def forward(self, **batch):
        return self.lm(**batch)


def test_a_target_that_is_never_called_loses_all_to_the_others():
    """The regulariser moves its P and Q all the same; but its λ gets no gradient."""
    model = WithUnused()
    inject(model, AdaLoRA(6, 3, 10, (*TARGETS, "unused"), **SCHEDULE))
    fit(model, TinyText(), STEPS, lr=1e-4, show=False)
    masks = {path: ada.mask for path, ada in branches_of(model).items()}
    assert len(masks) == 7 and not masks.pop("unused").any()
    assert sum(int(mask.sum()) for mask in masks.values()) == 7 * 3


def test_a_schedule_starts_without_the_statistics_of_an_earlier_training():
    clean, stale = tiny_llama(), tiny_llama()
    for model in (clean, stale):
        torch.manual_seed(5)
        inject(model, METHOD)
    poisoned = branches_of(stale)["model.layers.0.mlp.down_proj"]
    for part in PARTS:
        for kind in ("sensitivity", "uncertainty"):
            getattr(poisoned, f"{kind}_{part}").fill_(1e3)
    for model in (clean, stale):
        fit(model, TinyText(), STEPS, show=False)
    assert any("sensitivity" in name for name in state(stale))
    assert same(state(stale), state(clean))


def test_with_gradients_of_zero_nothing_is_settled_and_no_value_changes():
    ours = tiny_llama()
    inject(ours, replace(METHOD, delta=50))
    perturb(ours, 0.3)
    allocator = RankAllocator(branches_of(ours).values(), injection_of(ours).method)
    for p in trains(ours):
        p.grad = torch.zeros_like(p)
    with refused(ours, "no triplet would be left", RuntimeError):
        for step in range(1, METHOD.end + 1):
            assert not allocator.settled
            allocator.update(step)
    assert step == METHOD.end and not allocator.settled


# ------------------------------------------------------------------ forward, merge, files


def test_dropout_is_that_of_peft():
    ids = ids_of()
    theirs, ours = trained_pair(tiny_llama(), replace(METHOD, dropout=0.3), lora_dropout=0.3)
    found = []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(3)
        found.append(model(input_ids=ids).logits)
    close(*found)
    whole = ours.eval()(input_ids=ids).logits
    assert not torch.equal(whole, found[1])
    close(theirs.eval()(input_ids=ids).logits, whole)


def test_the_start():
    fresh = tiny_llama(hidden_size=256, intermediate_size=512)
    inject(fresh, AdaLoRA(32, 8, 10, TARGETS, **SCHEDULE))
    for ada in branches_of(fresh).values():
        assert not ada.lora_E.any()
        assert ada.lora_A.std().item() == pytest.approx(0.02, rel=0.05)
        assert ada.lora_B.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.fixture(scope="module")
def settled():
    """Return (base, ours) after 20 steps."""
    base = tiny_llama()
    _, ours = pair(base)
    fit(ours, TinyText(), STEPS, lr=5e-3, show=False)
    return base, ours.eval()


def test_our_file_holds_what_is_left_and_loads_in_peft(settled, tmp_path):
    base, ours = settled
    save_adapter(ours, tmp_path)
    pattern = read_config(tmp_path)["rank_pattern"]
    assert {n.removesuffix(".lora_E"): sum(f) for n, f in pattern.items()} == ranks(ours)
    tensors = load_file(tmp_path / WEIGHTS)
    assert len(tensors) == 18
    for path, rank in ranks(ours).items():
        stem = f"base_model.model.{path}."
        assert len(tensors[stem + "lora_A"]) == len(tensors[stem + "lora_E"]) == rank
        assert tensors[stem + "lora_B"].shape[1] == rank
    theirs, again = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path), deepcopy(base)
    small = load_adapter(again, tmp_path)
    assert small.total - small.base == sum(t.numel() for t in tensors.values())
    assert ranks(again) == ranks(ours)
    first = repr(small).splitlines()[0]
    assert first.startswith("AdaLoRA(initial_rank=6, target_rank=3") and "kept" not in first
    expected = ours(input_ids=ids_of()).logits
    for model in (theirs, again):
        close(model(input_ids=ids_of()).logits, expected)
    assert (base(input_ids=ids_of()).logits - expected).abs().max() > 1e-3
    # What was loaded is saved as it was, and its ranks are of these layers alone.
    save_adapter(again, tmp_path / "again")
    assert same_adapter(tmp_path / "again", tmp_path)
    method = injection_of(again).method
    elsewhere = replace(method, targets=("o_proj",))
    for other, described in ((tiny_llama(num_hidden_layers=3), method), (tiny_llama(), elsewhere)):
        with refused(other, "say nothing of 'model.layers"):
            inject(other, described)


def test_a_layer_without_any_triplet_travels_too(settled, tmp_path):
    base, ours = settled[0], deepcopy(settled[1])
    path = "model.layers.0.self_attn.v_proj"
    with torch.no_grad():
        branches_of(ours)[path].mask.zero_()
        branches_of(ours)[path].lora_E.zero_()
    save_adapter(ours, tmp_path)
    expected = ours(input_ids=ids_of()).logits
    theirs = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path)
    again = deepcopy(base)
    load_adapter(again, tmp_path, trainable=True)
    assert ranks(again)[path] == 0 and branches_of(again)[path].lora_A.shape == (0, 64)
    for model in (theirs, again):
        assert (model(input_ids=ids_of()).logits - expected).abs().max() <= 1e-6
    fit(again, TinyText(), 3, show=False)
    merge(again)


def test_a_file_of_peft_loads_here_and_trains_on(tmp_path):
    base = tiny_llama()
    theirs = theirs_on(base)
    assert len(list(steps_of(theirs))) == STEPS
    expected = theirs.eval()(input_ids=ids_of()).logits
    kept = {path: sum(flags) for path, flags in pattern_of(theirs).items()}
    theirs.save_pretrained(tmp_path)
    ours = deepcopy(base)
    load_adapter(ours, tmp_path, trainable=True)
    close(ours(input_ids=ids_of()).logits, expected)
    assert ranks(ours) == kept and sum(kept.values()) == 18
    method = injection_of(ours).method
    assert method == AdaLoRA(6, 3, 10, method.targets, **SCHEDULE, kept=method.kept)
    # What was pruned is gone: training goes on with the ranks that are left, however long.
    fit(ours, TinyText(), 7, show=False)
    assert ranks(ours) == kept
    merge(ours)


def test_the_smallest_file_that_peft_loads_has_its_defaults_and_trains_without_a_schedule(tmp_path):
    source, base = tiny_llama(), tiny_llama()
    inject(source, AdaLoRA(4, 2, 6, ("q_proj",), 0, 0, 1, 2))
    save_adapter(perturb(source, 0.3), tmp_path)
    rewrite(tmp_path)  # without our header, which vouches for the config
    config = {"peft_type": "ADALORA", "init_r": 4, "total_step": 1, "target_modules": ["q_proj"]}
    (tmp_path / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    expected = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path)(input_ids=ids_of()).logits
    load_adapter(base, tmp_path, trainable=True)
    close(base(input_ids=ids_of()).logits, expected)
    method, default = injection_of(base).method, peft.AdaLoraConfig(total_step=1)
    names = "beta1 beta2 orth_reg_weight tinit tfinal deltaT lora_alpha target_r lora_dropout"
    fields = {name: field for field, (name, _) in AdaLoRA.files.fields.items()}
    for name in names.split():
        assert getattr(method, fields[name]) == getattr(default, name), name
    # target_r is 8, above init_r: this schedule cannot run.
    fit(base, TinyText(), 2, show=False)
    assert set(ranks(base).values()) == {4}


def test_an_adapter_saved_before_its_ranks_are_settled_runs_its_schedule(tmp_path):
    source, again = tiny_llama(), tiny_llama()
    method = replace(METHOD, orthogonal=0.0)
    inject(source, method)
    save_adapter(perturb(source, 0.3), tmp_path)
    assert read_config(tmp_path)["rank_pattern"] is None
    load_adapter(again, tmp_path, trainable=True)
    assert injection_of(again).method == method
    assert method.penalty(injection_of(again)) == 0.0
    for steps in (7, 21):
        with refused(again, f"steps={steps}, but .* total_steps=20"):
            fit(again, TinyText(), steps, show=False)
    fit(again, TinyText(), STEPS, show=False)
    assert sum(ranks(again).values()) == 6 * 3


def test_pruned_rows_that_have_grown_back_are_not_saved(settled, tmp_path):
    ours = deepcopy(settled[1])
    save_adapter(ours, tmp_path)
    files = contents(tmp_path)
    pruned = next(ada for ada in branches_of(ours).values() if not ada.mask.all())
    with torch.no_grad():
        pruned.lora_E[~pruned.mask] = 0.1
    with pytest.raises(ValueError, match="lora_E has grown back after pruning"):
        save_adapter(ours, tmp_path)
    assert contents(tmp_path) == files


def test_saved_in_the_middle_of_a_schedule_it_is_whole(tmp_path):
    """PEFT drops rows that the last pruning cut and that have grown back; here none is lost."""
    base = tiny_llama()
    theirs, ours = pair(base)
    assert len(list(steps_of(theirs, ours, 13))) == 13
    assert set(ranks(ours).values()) == {6}  # all have grown back
    expected = ours(input_ids=ids_of()).logits
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")

    def off(folder):
        model = peft.PeftModel.from_pretrained(deepcopy(base), folder)
        return (model(input_ids=ids_of()).logits - expected).abs().max().item()

    assert off(tmp_path / "ours") <= 1e-6 < 1e-4 < off(tmp_path / "theirs")
    load_adapter(base, tmp_path / "ours")
    close(base(input_ids=ids_of()).logits, expected)


E = f"{Q_PROJ}.lora_E"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"model.layers.9.q.lora_E": [True] * 6}, "which the weights do not hold"),
        ({f"{Q_PROJ}.lora_A": [True] * 6}, "which the weights do not hold"),
        ({E: [True] * 5}, "must be init_r"),
        ({E: [1] * 6}, "must be init_r"),
        ({E: 6}, "must be init_r"),
        ({E: [True] + [False] * 5}, "say nothing of 'model.layers.0.self_attn.v_proj'"),
        ([1], "must be a table of layers"),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused(settled, tmp_path, pattern, message):
    base, ours = deepcopy(settled[0]), settled[1]
    save_adapter(ours, tmp_path)
    with refused(base, message):
        load_adapter(base, rewrite(tmp_path, rank_pattern=pattern))


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_rank": 6}, "target_rank=6 must be below initial_rank=6"),
        ({"tinit": 15}, "tinit=15 leaves no step to prune in"),
        ({"tfinal": 17}, "tinit=3 leaves no step to prune in before .* = 3"),
        ({"tfinal": 30}, "20 − 30 = -10"),
        ({"tinit": 0, "tfinal": 19}, "before any importance is known"),
        ({"total_steps": None}, "total_steps=None"),
        ({"beta1": 1.0}, "beta1=1.0 must lie between 0 and 1"),
    ],
)
def test_settings_that_make_no_schedule_are_refused(change, message):
    with pytest.raises(ValueError, match=f"^AdaLoRA: .*{message}"):
        replace(METHOD, **change)


def test_a_rank_above_the_layers_width_is_refused():
    ours = tiny_llama()
    with refused(ours, "initial_rank=40 is above .*v_proj"):
        inject(ours, replace(METHOD, initial_rank=40))


def test_a_schedule_does_not_run_in_16_bits_and_settled_ranks_do(settled):
    ours = tiny_llama()
    inject(ours, METHOD)
    ours.bfloat16()
    with refused(ours, r"in torch.bfloat16, in which scores .* model\.float"):
        fit(ours, TinyText(), STEPS, show=False)
    done = deepcopy(settled[1]).bfloat16()
    fit(done, TinyText(), 3, show=False)
    assert ranks(done) == ranks(settled[1])


def test_ranks_of_a_model_without_adalora_are_refused():
    other = tiny_llama()
    inject(other, DoRA(4, 6, ("q_proj",)))
    for model in (tiny_llama(), other):
        with pytest.raises(ValueError, match="holds no AdaLoRA"):
            ranks(model)
