"""AdaLoRA against Hugging Face PEFT: every number of a training, its files, and what is refused.

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

from peft_lessons import (
    AdaLoRA,
    DoRA,
    fit,
    inject,
    load_adapter,
    merge,
    report,
    save_adapter,
    unload,
)
from peft_lessons.engine import CONFIG, WEIGHTS, injection_of
from peft_lessons.methods.adalora import (
    PARTS,
    LinearWithAdaLoRA,
    RankAllocator,
    budget_after,
    ranks,
)

pytestmark = pytest.mark.filterwarnings(
    # Not so: PEFT takes AdaLoRA's pattern for LoRA's, whose keys are layers, and reads it later.
    "ignore:The following rank_pattern keys did not match:RuntimeWarning",
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


def copied(theirs, ours):
    """Our model with PEFT's values in its branches."""
    branches = branches_of(ours)
    assert list(branches) == list(layers_of(theirs))
    with torch.no_grad():
        for path, layer in layers_of(theirs).items():
            for part in PARTS:
                getattr(branches[path], part).copy_(getattr(layer, part)["default"])
    return ours


def pair(base, method=METHOD, **changes):
    torch.manual_seed(7)
    theirs, ours = theirs_on(base, **changes), deepcopy(base)
    inject(ours, method)
    return theirs, copied(theirs, ours)


def assert_same_values(theirs, ours, tolerance=1e-6):
    branches = branches_of(ours)
    for path, layer in layers_of(theirs).items():
        for part in PARTS:
            a, b = getattr(layer, part)["default"], getattr(branches[path], part)
            assert (a - b).abs().max() <= tolerance, (path, part)
        gone = layer.lora_E["default"] == 0
        assert torch.equal(gone, branches[path].lora_E == 0), path


def pattern_of(theirs):
    pattern = theirs.peft_config["default"].rank_pattern
    return {n.removesuffix(".default").removesuffix(".lora_E"): f for n, f in pattern.items()}


def trains(model):
    return [p for p in model.parameters() if p.requires_grad]


def trained_pair(base, method=METHOD, **changes):
    """Both with the same values, as after training."""
    theirs, ours = pair(base, method, **changes)
    perturb(ours, 0.3)
    with torch.no_grad():
        for path, layer in layers_of(theirs).items():
            for part in PARTS:
                getattr(layer, part)["default"].copy_(getattr(branches_of(ours)[path], part))
    return theirs, ours


def ids_of(seed=3):
    return torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ the training


@pytest.mark.parametrize("delta", [1, 2, 5, 50])
@pytest.mark.parametrize(("tinit", "tfinal"), [(3, 5), (0, 0)])
def test_twenty_steps_by_hand_equal_those_of_peft(delta, tinit, tfinal):
    method = AdaLoRA(6, 3, 10.0, TARGETS, tinit, tfinal, delta, STEPS, beta1=0.8, beta2=0.9)
    changes = dict(tinit=tinit, tfinal=tfinal, deltaT=delta, beta1=0.8, beta2=0.9)
    theirs, ours = pair(tiny_llama(), method, **changes)
    injection, batches = injection_of(ours), TinyText().stream(8, seed=0)
    first, second = (torch.optim.AdamW(trains(m), lr=5e-3) for m in (theirs, ours))
    pruned = 0
    for step, batch in zip(range(1, STEPS + 1), batches, strict=False):
        a = theirs(**batch).loss
        a.backward()
        first.step()
        theirs.base_model.update_and_allocate(step)
        first.zero_grad()
        b = ours(**batch).loss
        b = b + method.penalty(injection)
        b.backward()
        second.step()
        method.after_step(injection, step)
        second.zero_grad()
        assert abs(a - b) <= 1e-6, step
        assert_same_values(theirs, ours)
        pruned += any(rank < 6 for rank in ranks(ours).values())
    assert pruned >= 1
    masks = {path: ada.mask.tolist() for path, ada in branches_of(ours).items()}
    assert masks == pattern_of(theirs)
    assert sum(map(sum, masks.values())) == 3 * len(masks) == sum(ranks(ours).values())


class Recorded(AdaLoRA):
    """Notes A, E and B after every step."""

    def after_step(self, injection, step):
        super().after_step(injection, step)
        values = {p: deepcopy(w.ada.state_dict()) for p, w in injection.wrappers.items()}
        injection.__dict__.setdefault("record", []).append(values)


def test_twenty_steps_of_fit_equal_those_of_peft():
    lr = 5e-3
    method = Recorded(6, 3, 10.0, TARGETS, **SCHEDULE)
    theirs, ours = pair(tiny_llama(), method)
    history = fit(ours, TinyText(), STEPS, lr=lr, batch_size=8, clip=None, show=False)
    record = injection_of(ours).record
    optimizer = torch.optim.AdamW(trains(theirs), lr=lr, weight_decay=0.0, fused=True)
    theirs.train()
    shares = [(i + 1) / 2 if i < 2 else (STEPS - i) / (STEPS - 2) for i in range(STEPS)]
    for step, batch in zip(range(STEPS), TinyText().stream(8, seed=0), strict=False):
        optimizer.param_groups[0]["lr"] = lr * shares[step]
        loss = theirs(**batch).loss
        loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
        assert abs(loss.item() - history.loss[step]) <= 1e-6
        for path, layer in layers_of(theirs).items():
            for part in PARTS:
                a, b = getattr(layer, part)["default"], record[step][path][f"{part}"]
                assert (a - b).abs().max() <= 1e-6 and torch.equal(a == 0, b == 0)
    masks = {path: ada.mask.tolist() for path, ada in branches_of(ours).items()}
    assert masks == pattern_of(theirs)
    counts = [sum(int(v["lora_E"].count_nonzero()) for v in r.values()) for r in record]
    # Pruned every second step from the fourth on, grown back between, settled from the 15th.
    assert counts == [36, 36, 36, 31, 36, 25, 36, 21, 36, 19, 36, 18, 36, 18] + [18] * 6
    assert [ada.mask.sum() for ada in branches_of(ours).values()] == list(ranks(ours).values())


def test_the_budget_is_that_of_peft_at_every_step():
    allocator = theirs_on(
        tiny_llama(), total_step=300, tinit=20, tfinal=50
    ).base_model.rankallocator
    method = AdaLoRA(6, 3, 10.0, TARGETS, 20, 50, 2, 300)
    expected = [allocator.budget_schedule(step)[0] for step in range(1, method.end + 1)]
    got = [budget_after(step, method, 6) for step in range(1, method.end + 1)]
    assert got == expected
    assert got[:20] == [36] * 20 and got[20] == 35 and got[-1] == 18
    assert got == sorted(got, reverse=True)


def test_penalty_is_the_mean_of_the_norms_and_joins_the_loss():
    base = tiny_llama()
    ours = deepcopy(base)
    inject(ours, METHOD)
    perturb(ours, 0.3)
    grams = [
        g
        for a in branches_of(ours).values()
        for g in (a.lora_A @ a.lora_A.T, a.lora_B.T @ a.lora_B)
    ]
    mean = sum(torch.dist(g, torch.eye(6)) for g in grams) / 12
    torch.testing.assert_close(METHOD.penalty(injection_of(ours)), 0.5 * mean)
    free = AdaLoRA(6, 3, 10, TARGETS, **SCHEDULE, orthogonal=0)
    other = deepcopy(base)
    inject(other, free)
    assert free.penalty(injection_of(other)) == 0.0


def test_without_a_task_type_peft_leaves_the_regulariser_out_and_ours_does_not():
    base, ids = tiny_llama(), ids_of()
    silent, theirs = theirs_on(base, task_type=None), theirs_on(base)
    plain = base(input_ids=ids, labels=ids).loss
    assert torch.equal(silent(input_ids=ids, labels=ids).loss, plain)
    # ‖I‖ of a nearly empty 6 × 6 Gram matrix is √6; half of it is added.
    assert theirs(input_ids=ids, labels=ids).loss - plain > 1


def test_a_second_fit_keeps_the_ranks_and_a_broken_off_one_starts_anew():
    ours = tiny_llama()
    inject(ours, METHOD)
    allocator = RankAllocator(branches_of(ours).values(), METHOD)
    fit(ours, TinyText(), STEPS, show=False)
    assert allocator.settled
    before = ranks(ours)
    fit(ours, TinyText(), 3, show=False)  # any number of steps
    assert ranks(ours) == before

    class Broken(TinyText):
        def stream(self, *args, **kw):
            for i, batch in enumerate(super().stream(*args, **kw)):
                assert i < 7, "the laptop was closed"
                yield batch

    again = tiny_llama()
    inject(again, METHOD)
    with pytest.raises(AssertionError, match="closed"):
        fit(again, Broken(), STEPS, show=False)
    allocator = RankAllocator(branches_of(again).values(), METHOD)
    assert not allocator.settled
    stale = [b for n, b in again.named_buffers() if "sensitivity" in n]
    assert all(b.any() for b in stale)
    fit(again, TinyText(), STEPS, show=False)
    assert sum(ranks(again).values()) == 18


def test_gradients_cleared_too_early_are_noticed():
    ours = tiny_llama()
    inject(ours, METHOD)
    with pytest.raises(RuntimeError, match="before zero_grad"):
        METHOD.after_step(injection_of(ours), 1)


def test_a_layer_that_takes_no_part_is_pruned_first():
    ours = tiny_llama()
    inject(ours, METHOD)
    injection = injection_of(ours)
    injection.wrappers["model.layers.1.mlp.down_proj"].merged = True  # its branch is off
    optimizer = torch.optim.AdamW(trains(ours), lr=5e-3)
    for step, batch in zip(range(1, 5), TinyText().stream(8, seed=0), strict=False):
        ours(**batch).loss.backward()
        optimizer.step()
        METHOD.after_step(injection, step)
        optimizer.zero_grad()
    unused = branches_of(ours)["model.layers.1.mlp.down_proj"]
    assert not unused.sensitivity_lora_E.any() and not unused.lora_E.any()
    assert sum(ranks(ours).values()) == 30  # the budget is 31, but equal scores go together


class WithUnused(nn.Module):
    """A language model and a layer that its forward never calls."""

    def __init__(self):
        super().__init__()
        self.lm, self.unused = tiny_llama(), nn.Linear(64, 64)

    def forward(self, **batch):
        return self.lm(**batch)


def test_a_target_that_is_never_called_loses_all_to_the_others():
    """The regulariser moves its P and Q all the same, and at this learning rate as much as it does
    those that are called; but its λ gets no gradient."""
    model = WithUnused()
    inject(model, AdaLoRA(6, 3, 10, (*TARGETS, "unused"), **SCHEDULE))
    assert injection_of(model).method.orthogonal == 0.5
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


def test_without_any_difference_of_scores_nothing_is_settled():
    """λ of 1e-30 times their gradients are 0 in float32, and so is every score."""
    ours = tiny_llama()
    inject(ours, replace(METHOD, tinit=0, orthogonal=0.0))
    with pytest.raises(RuntimeError, match="no triplet would be left"):
        fit(ours, TinyText(), STEPS, lr=1e-30, show=False)
    assert all(ada.mask.all() for ada in branches_of(ours).values())


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_and_gradients_equal_those_of_peft(dtype):
    base, ids = tiny_llama().to(dtype), ids_of()
    theirs, ours = trained_pair(base)
    a, b = theirs(input_ids=ids, labels=ids), ours(input_ids=ids, labels=ids)
    one = 2**-8 * a.logits.abs().max() if dtype == torch.bfloat16 else 1e-6
    assert b.logits.dtype == dtype
    close(a.logits, b.logits, one)
    assert (a.logits - base(input_ids=ids).logits).abs().max() > 0.05
    a.loss.backward()
    (b.loss + METHOD.penalty(injection_of(ours))).backward()
    for path, layer in layers_of(theirs).items():
        for part in PARTS:
            x, y = getattr(layer, part)["default"].grad, getattr(branches_of(ours)[path], part).grad
            assert x.any()
            close(x, y, 1e-6 if dtype != torch.bfloat16 else 2**-7 * x.abs().max())


def test_dropout_of_the_branch():
    base, ids = tiny_llama(), ids_of()
    theirs, ours = trained_pair(base, replace(METHOD, dropout=0.3), lora_dropout=0.3)
    for model in (theirs, ours):
        model.train()
    assert not torch.equal(ours(input_ids=ids).logits, ours(input_ids=ids).logits)
    torch.manual_seed(3)
    a = theirs(input_ids=ids).logits
    torch.manual_seed(3)
    b = ours(input_ids=ids).logits
    assert (a - b).abs().max() <= 1e-6
    for model in (theirs, ours):
        model.eval()
    whole = ours(input_ids=ids).logits
    assert torch.equal(ours(input_ids=ids).logits, whole) and not torch.equal(whole, b)
    assert (theirs(input_ids=ids).logits - whole).abs().max() <= 1e-6


def test_the_start():
    fresh = tiny_llama(hidden_size=256, intermediate_size=512)
    inject(fresh, AdaLoRA(32, 8, 10, TARGETS, **SCHEDULE))
    for ada in branches_of(fresh).values():
        assert not ada.lora_E.any()
        assert ada.lora_A.std().item() == pytest.approx(0.02, rel=0.05)
        assert ada.lora_B.std().item() == pytest.approx(0.02, rel=0.05)


def test_report_counts_the_initial_rank():
    ours = tiny_llama()
    # Σ r (in + out + 1): q 64→64, v 64→32, down 96→64, in two layers.
    assert inject(ours, METHOD).trainable == 2 * 6 * (129 + 97 + 161)


def test_merged_before_the_schedule_it_is_pefts():
    theirs, ours = trained_pair(tiny_llama())
    merge(ours)
    merged = theirs.merge_and_unload().state_dict()
    plain = unload(ours).state_dict()
    assert merged.keys() == plain.keys()
    for name in merged:
        assert (merged[name] - plain[name]).abs().max() <= 1e-6


@pytest.fixture(scope="module")
def settled():
    """(base, ours) after 20 steps, of whose layers one loses all."""
    base = tiny_llama()
    _, ours = pair(base)
    fit(ours, TinyText(), STEPS, lr=5e-3, show=False)
    return base, ours.eval()


def kept_everywhere(folder):
    config = read_config(folder)
    return {n.removesuffix(".lora_E"): sum(f) for n, f in config["rank_pattern"].items()}


def test_our_file_loads_in_peft(settled, tmp_path):
    base, ours = settled
    save_adapter(ours, tmp_path)
    assert kept_everywhere(tmp_path) == ranks(ours)
    tensors = load_file(tmp_path / WEIGHTS)
    assert len(tensors) == 18 and not any("mask" in key for key in tensors)
    for path, rank in ranks(ours).items():
        stem = f"base_model.model.{path}."
        assert len(tensors[stem + "lora_A"]) == len(tensors[stem + "lora_E"]) == rank
        assert tensors[stem + "lora_B"].shape[1] == rank
    theirs = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path)
    expected = ours(input_ids=ids_of()).logits
    assert (theirs(input_ids=ids_of()).logits - expected).abs().max() <= 1e-6
    assert (base(input_ids=ids_of()).logits - expected).abs().max() > 1e-3
    again = deepcopy(base)
    small = load_adapter(again, tmp_path)
    assert small.total - small.base == sum(t.numel() for t in tensors.values())
    assert (again(input_ids=ids_of()).logits - expected).abs().max() <= 1e-6
    assert ranks(again) == ranks(ours)
    # And once more: what was loaded is saved as it was.
    save_adapter(again, tmp_path / "again")
    assert same_adapter(tmp_path / "again", tmp_path)


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


def test_a_file_of_peft_loads_here(tmp_path):
    base = tiny_llama()
    theirs = theirs_on(base)
    optimizer = torch.optim.AdamW(trains(theirs), lr=5e-3)
    for step, batch in zip(range(1, STEPS + 1), TinyText().stream(8, seed=0), strict=False):
        theirs(**batch).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    expected = theirs.eval()(input_ids=ids_of()).logits
    kept = {path: sum(flags) for path, flags in pattern_of(theirs).items()}
    theirs.save_pretrained(tmp_path)
    ours = deepcopy(base)
    load_adapter(ours, tmp_path, trainable=True)
    assert (ours(input_ids=ids_of()).logits - expected).abs().max() <= 1e-6
    assert ranks(ours) == kept and sum(kept.values()) == 18
    method = injection_of(ours).method
    assert method == AdaLoRA(6, 3, 10, method.targets, **SCHEDULE, kept=method.kept)
    # What was pruned is gone: training goes on with the ranks that are left, however long.
    fit(ours, TinyText(), 7, show=False)
    assert ranks(ours) == kept
    merge(ours)


def smallest_file(folder):
    """What PEFT needs to load an AdaLoRA; target_r is 8 then: this schedule cannot run."""
    source = tiny_llama()
    inject(source, AdaLoRA(4, 2, 6, ("q_proj",), 0, 0, 1, 2))
    save_adapter(perturb(source, 0.3), folder)
    config = {"peft_type": "ADALORA", "init_r": 4, "total_step": 1, "target_modules": ["q_proj"]}
    rewrite(folder)  # without our header, which vouches for the config
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_smallest_file_that_peft_loads(tmp_path, steps):
    base = tiny_llama()
    smallest_file(tmp_path)
    expected = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path)(input_ids=ids_of()).logits
    load_adapter(base, tmp_path, trainable=True)
    assert (base(input_ids=ids_of()).logits - expected).abs().max() <= 1e-6
    fit(base, TinyText(), steps, show=False)
    assert (base(input_ids=ids_of()).logits - expected).abs().max() > 1e-4
    assert ranks(base) == {
        "model.layers.0.self_attn.q_proj": 4,
        "model.layers.1.self_attn.q_proj": 4,
    }


def test_what_a_file_does_not_say_is_pefts_default(tmp_path):
    smallest_file(tmp_path)
    ours = tiny_llama()
    load_adapter(ours, tmp_path)
    method, default = injection_of(ours).method, peft.AdaLoraConfig(total_step=1)
    assert method.initial_rank == 4 and method.targets == ("q_proj",)
    names = "beta1 beta2 orth_reg_weight tinit tfinal deltaT lora_alpha target_r lora_dropout"
    fields = {name: field for field, (name, _) in AdaLoRA.files.fields.items()}
    for name in names.split():
        assert getattr(method, fields[name]) == getattr(default, name), name


def test_a_regulariser_that_is_off_stays_off(tmp_path):
    source, again = tiny_llama(), tiny_llama()
    inject(source, replace(METHOD, orthogonal=0.0))
    save_adapter(source, tmp_path)
    assert peft.AdaLoraConfig.from_pretrained(tmp_path).orth_reg_weight == 0.0
    load_adapter(again, tmp_path, trainable=True)
    method = injection_of(again).method
    assert method == replace(METHOD, orthogonal=0.0)
    assert method.penalty(injection_of(again)) == 0.0


def test_an_adapter_saved_before_its_ranks_are_settled_runs_its_schedule(tmp_path):
    source, again = tiny_llama(), tiny_llama()
    inject(source, METHOD)
    save_adapter(perturb(source, 0.3), tmp_path)
    assert read_config(tmp_path)["rank_pattern"] is None
    load_adapter(again, tmp_path, trainable=True)
    assert injection_of(again).method == METHOD
    with refused(again, "steps=7, but .* total_steps=20"):
        fit(again, TinyText(), 7, show=False)
    fit(again, TinyText(), STEPS, show=False)
    assert sum(ranks(again).values()) == 6 * 3


def test_settled_ranks_are_of_the_layers_they_were_settled_for(settled, tmp_path):
    save_adapter(settled[1], tmp_path)
    loaded = deepcopy(settled[0])
    load_adapter(loaded, tmp_path)
    method = injection_of(loaded).method
    assert method.kept
    elsewhere = replace(method, targets=("o_proj",))
    for base, described in ((tiny_llama(num_hidden_layers=3), method), (tiny_llama(), elsewhere)):
        with refused(base, "say nothing of 'model.layers"):
            inject(base, described)


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
    injection = injection_of(ours)
    first, second = (torch.optim.AdamW(trains(m), lr=5e-3) for m in (theirs, ours))
    for step, batch in zip(range(1, 14), TinyText().stream(8, seed=0), strict=False):
        theirs(**batch).loss.backward()
        first.step()
        theirs.base_model.update_and_allocate(step)
        first.zero_grad()
        (ours(**batch).loss + METHOD.penalty(injection)).backward()
        second.step()
        METHOD.after_step(injection, step)
        second.zero_grad()
    assert set(ranks(ours).values()) == {6}  # step 13: all have grown back
    expected = ours(input_ids=ids_of()).logits
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")

    def off(folder):
        model = peft.PeftModel.from_pretrained(deepcopy(base), folder)
        return (model(input_ids=ids_of()).logits - expected).abs().max().item()

    assert off(tmp_path / "ours") <= 1e-6
    assert off(tmp_path / "theirs") > 1e-4
    again = deepcopy(base)
    load_adapter(again, tmp_path / "ours")
    assert (again(input_ids=ids_of()).logits - expected).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rank_pattern": {"model.layers.9.q.lora_E": [True] * 6}},
            "which the weights do not hold",
        ),
        (
            {"rank_pattern": {f"{Q_PROJ}.lora_E": [True] * 5}},
            "must be init_r",
        ),
        ({"rank_pattern": {f"{Q_PROJ}.lora_E": [1] * 6}}, "must be init_r"),
        (
            {"rank_pattern": {f"{Q_PROJ}.lora_E": [True] + [False] * 5}},
            "say nothing of 'model.layers.0.self_attn.v_proj'",
        ),
        ({"rank_pattern": {f"{Q_PROJ}.lora_A": [True] * 6}}, "which the weights do not hold"),
        ({"rank_pattern": {f"{Q_PROJ}.lora_E": 6}}, "must be init_r"),
        ({"rank_pattern": {f"{Q_PROJ}.lora_E": None}}, "must be init_r"),
        ({"rank_pattern": {f"{Q_PROJ}.lora_E": [None] * 6}}, "must be init_r"),
        ({"rank_pattern": [1]}, "must be a table of layers"),
        ({"rank_pattern": [[f"{Q_PROJ}.lora_E", [True] * 6]]}, "must be a table of layers"),
        ({"rank_pattern": 6}, "must be a table of layers, not 6"),
        ({"total_step": None}, "total_steps=None"),
        ({"use_dora": True}, "use_dora"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(settled, tmp_path, change, message):
    base, ours = deepcopy(settled[0]), settled[1]
    save_adapter(ours, tmp_path)
    with refused(base, message):
        load_adapter(base, rewrite(tmp_path, **change))


# ------------------------------------------------------------------ what is refused

GOOD = dict(initial_rank=6, target_rank=3, alpha=10.0, targets=TARGETS, **SCHEDULE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_rank": 6}, "target_rank=6 must be below initial_rank=6"),
        ({"target_rank": 9}, "target_rank=9 must be below"),
        ({"target_rank": 0}, "target_rank=0 must be at least 1"),
        ({"initial_rank": 6.0}, "initial_rank=6.0 must be a whole number"),
        ({"initial_rank": True}, "initial_rank=True"),
        ({"tinit": 15}, "tinit=15 leaves no step to prune in"),
        ({"tinit": 20}, "tinit=20 leaves no step"),
        ({"tfinal": 17}, "tinit=3 leaves no step to prune in before .* = 3"),
        ({"tfinal": 30}, "20 − 30 = -10"),
        ({"tinit": -1}, "tinit=-1 must be at least 0"),
        ({"tfinal": -1}, "tfinal=-1 must be at least 0"),
        ({"tfinal": True}, "tfinal=True must be a whole number"),
        ({"tinit": 0, "tfinal": 19}, "before any importance is known"),
        ({"delta": 0}, "delta=0 must be at least 1"),
        ({"delta": 1.5}, "delta=1.5"),
        ({"total_steps": None}, "total_steps=None"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"beta1": 1.0}, "beta1=1.0 must lie between 0 and 1"),
        ({"beta1": 0}, "beta1=0 must lie between"),
        ({"beta2": 1.2}, "beta2=1.2"),
        ({"beta2": float("nan")}, "beta2=nan"),
        ({"orthogonal": -0.1}, "orthogonal=-0.1 must be a finite number, 0 or more"),
        ({"orthogonal": float("inf")}, "orthogonal=inf"),
        ({"alpha": 0}, "alpha=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_settings_that_make_no_schedule_are_refused(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        AdaLoRA(**(GOOD | change))
    assert str(caught.value).startswith("AdaLoRA: ")


@pytest.mark.parametrize("steps", [1, 19, 21, 200])
def test_fit_for_another_number_of_steps_is_refused(steps):
    ours = tiny_llama()
    inject(ours, METHOD)
    with refused(ours, f"steps={steps}, but .* total_steps=20"):
        fit(ours, TinyText(), steps, show=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_branch_that_was_turned_into_16_bits_is_refused(dtype):
    ours = tiny_llama()
    inject(ours, METHOD)
    ours.to(dtype)
    with refused(ours, rf"in {dtype}, in which scores .* model\.float"):
        fit(ours, TinyText(), STEPS, show=False)
    fit(ours.float(), TinyText(), STEPS, show=False)
    assert sum(ranks(ours).values()) == 18


def test_a_settled_branch_may_be_in_16_bits(settled):
    ours = deepcopy(settled[1]).bfloat16()
    fit(ours, TinyText(), 3, show=False)
    assert ranks(ours) == ranks(settled[1])


def test_a_branch_may_be_turned_into_64_bits():
    ours = tiny_llama()
    inject(ours, METHOD)
    fit(ours.double(), TinyText(), STEPS, show=False)
    assert sum(ranks(ours).values()) == 18
    assert {p.dtype for p in trains(ours)} == {torch.float64}


def test_a_layer_refused_is_not_frozen():
    linear = nn.Linear(9, 8)
    for settings in (dict(rank=0), dict(alpha=0.0), dict(dropout=1.0)):
        with pytest.raises(ValueError, match=next(iter(settings))):
            LinearWithAdaLoRA(linear, **settings)
        assert linear.weight.requires_grad and linear.bias.requires_grad


def test_ranks_of_a_model_without_adalora_are_refused():
    other = tiny_llama()
    with pytest.raises(ValueError, match="holds no AdaLoRA"):
        ranks(other)
    inject(other, DoRA(4, 6, ("q_proj",)))
    with pytest.raises(ValueError, match="holds no AdaLoRA"):
        ranks(other)


def test_a_rank_above_the_layers_width_is_refused():
    ours = tiny_llama()
    with refused(ours, "initial_rank=40 is above .*v_proj"):
        inject(ours, AdaLoRA(**(GOOD | {"initial_rank": 40})))


def test_report_after_load_shows_the_schedule_and_not_the_pattern(settled, tmp_path):
    save_adapter(settled[1], tmp_path)
    model = deepcopy(settled[0])
    load_adapter(model, tmp_path)
    first = repr(report(model)).splitlines()[0]
    assert first.startswith("AdaLoRA(initial_rank=6, target_rank=3") and "kept" not in first
