"""Checks of lesson 05."""

from collections import Counter
from contextlib import suppress
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput

from ..engine import inject, injection_of
from ..methods.adalora import AdaLoRA, allocator_of
from .compare import difference
from .kit import Case, Refused, check_for
from .mistakes import mistakes

# ------------------------------------------------------------------ update_importance


def _importance_case(shape, beta1=0.85, beta2=0.9, first=False, dtype=torch.float32, note=""):
    def make():
        weight, grad, s, u = torch.randn(4, *shape, dtype=dtype).unbind()
        s, u = (torch.zeros_like(s), torch.zeros_like(u)) if first else (s.abs(), u.abs())
        return [weight, grad, s, u, beta1, beta2]

    return Case(make, note=note)


@check_for(
    cases=[
        _importance_case((4, 10)),
        _importance_case((12, 3), 0.6, 0.95),
        _importance_case((5, 1), first=True, note="the first step: both averages are zero"),
        _importance_case((3, 7), 0.9, 0.9),
        _importance_case((2, 6), 0.3, 0.7, dtype=torch.float64),
    ],
    returns=("sensitivity", "uncertainty", "score"),
    causes=mistakes(
        """
        def update_importance(weight, grad, sensitivity, uncertainty, beta1, beta2):
            now = (weight * grad).abs()
            s = beta1 * sensitivity + (1 - beta1) * now
            u = beta2 * uncertainty + (1 - beta2) * (now - s).abs()
            return s, u, s * u
        """,
        """
        the uncertainty is measured from the old sensitivity: use the new one
            now - s → now - sensitivity
        the uncertainty is not an absolute value
            (now - s).abs() → (now - s)
        the deviation is squared, as in a variance: take its absolute value
            (now - s).abs() → (now - s) ** 2
        the uncertainty averages the importance itself, not its deviation
            (now - s).abs() → now
        the importance has a sign: take the absolute value of weight · grad
            (weight * grad).abs() → weight * grad
        β and 1 − β are swapped: β is the weight of the past
            now = → beta1, beta2 = 1 - beta1, 1 - beta2; now =
        the new value is not multiplied by 1 − β
            (1 - beta1) * → ∅
            (1 - beta2) * → ∅
        the averages are divided by 1 − β as in Adam: AdaLoRA has no bias correction
            * now → * now; s = s / (1 - beta1)
            (now - s).abs() → (now - s).abs(); u = u / (1 - beta2)
        beta1 and beta2 are swapped
            now = → beta1, beta2 = beta2, beta1; now =
        beta1 smooths both averages: the uncertainty uses beta2
            now = → beta2 = beta1; now =
        the score is the product of the old averages: take the new ones
            s * u → sensitivity * uncertainty
        the order is reversed: the score comes last
            s, u, s * u → s * u, s, u
        """,
    ),
)
def update_importance(weight, grad, sensitivity, uncertainty, beta1, beta2):
    """Both averages take one step, and the score is their product, entry by entry."""
    now = grad.mul(weight).abs()
    new_sensitivity = sensitivity + (1 - beta1) * (now - sensitivity)
    deviation = torch.maximum(now - new_sensitivity, new_sensitivity - now)
    new_uncertainty = uncertainty + (1 - beta2) * (deviation - uncertainty)
    return new_sensitivity, new_uncertainty, new_sensitivity * new_uncertainty


# ------------------------------------------------------------------ cubic_budget


@check_for(
    # None lies so near to a whole number that rounding in float could turn it.
    cases=[
        Case(lambda: [40, 144, 96, 20, 30, 150]),
        Case(lambda: [90, 144, 96, 20, 30, 150]),
        Case(lambda: [21, 144, 96, 20, 30, 150], note="the first step that may prune"),
        Case(lambda: [20, 144, 96, 20, 30, 150], note="the last step of the start"),
        Case(lambda: [3, 144, 96, 20, 30, 150], note="within the first tinit steps"),
        Case(lambda: [120, 144, 96, 20, 30, 150], note="step = total − tfinal"),
        Case(lambda: [141, 144, 96, 20, 30, 150], note="within the last tfinal steps"),
        Case(lambda: [119, 144, 96, 20, 30, 150], note="one step before total − tfinal"),
        Case(lambda: [50, 5000, 1000, 0, 0, 100], note="no start, no end: half of the steps"),
        Case(lambda: [7, 90, 6, 3, 5, 20]),
        Case(lambda: [100, 5000, 1000, 0, 0, 100], note="the last of all steps"),
    ],
    causes=mistakes(
        """
        def cubic_budget(step, initial, final, tinit, tfinal, total):
            end = total - tfinal
            if step <= tinit:
                return initial
            if step >= end:
                return final
            left = (end - step) / (end - tinit)
            return int(final + (initial - final) * left**3)
        """,
        """
        the budget stays at `initial`: // drops the fraction, or the share already done is cubed
            left**3 → 1
        1 − x³ prunes slowly at first: use (1 − x)³, the cube of the share that is left
            left**3 → (1 - (1 - left) ** 3)
        the budget rises: take the cube of the share that is left, not of the share already done
            left**3 → (1 - left) ** 3
        the result is rounded to the nearest: round down
            int( → round(
        the result is rounded up: round down
            int( → math.ceil(
        the result is not rounded: triplets are whole, so round down
            int( → (
        // rounds the share that is left down to 0: use /
            / (end - tinit) → // (end - tinit)
        the pruning ends at total: it must end tfinal steps earlier
            (end - step) / (end - tinit) → (total - step) / (total - tinit)
        tfinal is taken for a step: it is the number of steps after the pruning
            end = total - tfinal → end = tfinal
        the pruning is counted from step 0: it begins after tinit steps
            end - tinit → end
        this is equation 12 as it is printed: it starts above `initial`, because tfinal is
        subtracted from the step, too
            end - step → total - step
        before tinit the cube exceeds the initial budget: stay at `initial`
            step <= tinit → False
        after total − tfinal the share that is left is negative, and so is its cube: stay at `final`
            step >= end → False
        neither end is constant: the budget is `initial` until tinit and `final` from total − tfinal
        on
            step <= tinit → False
            step >= end → False
        `final` is not added: the cube scales only initial − final
            final + (initial → (initial
        """,
    ),
)
def cubic_budget(step, initial, final, tinit, tfinal, total):
    """The budget is right before, during and after the pruning."""
    way, gone = total - tfinal - tinit, min(max(step - tinit, 0), total - tfinal - tinit)
    # In whole numbers, so that nothing is rounded before the end.
    return final + (initial - final) * (way - gone) ** 3 // way**3


# ------------------------------------------------------------------ mask_to_budget


def _scores(*sizes):
    """Return layers of very different importance, so that a fixed share for each is wrong."""
    return [10 ** (2 * torch.rand(1) - 1) * torch.rand(size) for size in sizes]


def _ties():
    return [torch.tensor(s) for s in ([3.0, 1.0, 2.0], [2.0, 2.0, 5.0, 0.5], [2.0, 4.0])]


@check_for(
    cases=[
        Case(lambda: [_scores(6, 6, 6, 6), 12], note="four layers"),
        Case(lambda: [_scores(4, 9, 2), 7], note="layers of 4, 9 and 2 triplets"),
        Case(lambda: [_scores(5, 5), 10], note="all may stay"),
        Case(lambda: [_scores(8), 1], note="one layer, one triplet"),
        Case(lambda: [[1e-8 * s for s in _scores(6, 5)], 4], note="scores around 1e-8"),
        Case(lambda: [_ties(), 5], note="of four scores 2.0 the first two may stay"),
        Case(lambda: [[torch.zeros(30), torch.zeros(40)], 50], note="the first 50 zeros stay"),
    ],
    returns="masks",
    causes=mistakes(
        """
        def best(scores, budget):
            order = scores.argsort(descending=True, stable=True)
            stays = torch.zeros(len(scores), dtype=torch.bool)
            stays[order[:budget]] = True
            return stays

        def mask_to_budget(scores, budget):
            stays = best(torch.cat(scores), budget)
            return list(stays.split([len(score) for score in scores]))
        """,
        """
        every layer keeps the same number: rank all layers together
            list(stays.split([len(score) for score in scores])) →
                [best(score, budget // len(scores)) for score in scores]
        every layer keeps the same share of its triplets: rank all layers together
            list(stays.split([len(score) for score in scores])) →
                [best(score, round(budget * len(score) / len(stays))) for score in scores]
        the worst are kept, not the best
            descending=True, → ∅
        True marks the triplets that are pruned: it must mark those that stay
            return stays → return ~stays
        one triplet too many stays: >= also keeps the triplet at the threshold
            return stays →
                return scores >= (scores[order[budget]] if budget < len(scores) else -math.inf)
        one triplet too few stays: > also prunes the triplet at the threshold
            order[:budget] → order[: budget - 1]
        all triplets whose score equals the threshold are pruned, as in PEFT: here exactly `budget`
        triplets stay
            return stays →
                return scores > (scores[order[budget]] if budget < len(scores) else -math.inf)
        all triplets whose score equals the threshold stay: that exceeds the budget
            return stays → return scores >= scores[order[budget - 1]]
        among equal scores the last ones stay: keep the first ones
            scores.argsort(descending=True, stable=True) → scores.argsort(stable=True).flip(0)
        topk and an unstable sort order equal scores arbitrarily: use argsort with stable=True
            order[:budget] → scores.topk(budget).indices
        argsort returns the indices of the triplets in order, not the rank of each triplet:
        order[:budget] stays
            return stays → return order < budget
        chunk cuts into equal parts, but layers differ in size: give their sizes to split
            stays.split([len(score) for score in scores]) → stays.chunk(len(scores))
        """,
    ),
)
def mask_to_budget(scores, budget):
    """Exactly `budget` triplets stay, the best of all layers, and the first ones among equal
    scores."""
    places = [(i, j) for i, score in enumerate(scores) for j in range(len(score))]
    places.sort(key=lambda place: -scores[place[0]][place[1]].item())  # Python's sort is stable
    masks = [torch.zeros(len(score), dtype=torch.bool) for score in scores]
    for i, j in places[:budget]:
        masks[i][j] = True
    return masks


# ------------------------------------------------------------------ triplet_scores

_RANKS, _WIDTH, _START = (4, 2, 0), 32, 6  # the ranks that three layers need, and that they have
_STARTS, _ENOUGH = 8, 6


def _planted():
    """Return the changes to learn, one (starts, 32, 32) for each layer."""
    changes = []
    for rank in _RANKS:
        U, V = torch.linalg.qr(torch.randn(2, _STARTS, _WIDTH, _WIDTH)).Q
        changes.append(U[..., :rank] @ V[..., :rank].mT)
    return changes


def _found(score, steps=300, first=60, last=220, seed=5):
    """Train three layers with pruning by a score; return the ranks of each start, and some
    (arguments, scores) of the first one.

    All starts train side by side; a score gets one layer of one of them at a time."""
    torch.random.default_generator.manual_seed(seed)
    changes, n = _planted(), len(_RANKS) * _START
    layers = [
        (
            0.02 * torch.randn(_STARTS, _START, _WIDTH),
            torch.zeros(_STARTS, _START, 1),
            0.02 * torch.randn(_STARTS, _WIDTH, _START),
        )
        for _ in _RANKS
    ]
    trained = [p.requires_grad_() for layer in layers for p in layer]
    optimizer = torch.optim.Adam(trained, lr=0.03)
    scores, keep = torch.zeros(_STARTS, n), torch.ones(_STARTS, n, dtype=torch.bool)
    seen = []
    for step in range(1, steps + 1):
        with torch.enable_grad():
            x, noise = torch.randn(2, len(_RANKS), _STARTS, 64, _WIDTH)
            errors = [
                each @ (Q * lam).mT @ P.mT - each @ change.mT - 0.3 * off
                for (Q, lam, P), change, each, off in zip(layers, changes, x, noise, strict=True)
            ]
            sum(error.square().mean(dim=(1, 2)).sum() for error in errors).backward()
        optimizer.step()
        if step <= last:
            if step % 20 == 0:
                seen += [(_arguments(layer, 0), _of_one(score, layer, 0)) for layer in layers]
            now = [[_of_one(score, layer, start) for layer in layers] for start in range(_STARTS)]
            scores = 0.85 * scores + 0.15 * torch.stack([torch.cat(row) for row in now])
        if first < step <= last and step % 10 == 0:
            left = 1 - (step - first) / (last - first)
            budget = sum(_RANKS) + round((n - sum(_RANKS)) * left**3)
            best = scores.argsort(dim=1, descending=True, stable=True)[:, :budget]
            keep = torch.zeros_like(keep).scatter(1, best, True)
        if step > last or (step > first and step % 10 == 0):
            for (_, lam, _), stays in zip(layers, keep.split(_START, dim=1), strict=True):
                lam.data[~stays] = 0.0
        optimizer.zero_grad()
    ranks = keep.view(_STARTS, len(_RANKS), _START).sum(dim=2).tolist()
    return list(map(tuple, ranks)), seen


def _arguments(layer, start):
    weights = [p[start].detach().clone() for p in layer]
    return weights + [p.grad[start].clone() for p in layer]


def _of_one(score, layer, start):
    """Return the scores of one layer of one start; Refused if they are none."""
    arguments = _arguments(layer, start)
    before = [t.clone() for t in arguments]
    got = score(*arguments)
    if not isinstance(got, torch.Tensor):
        raise Refused(difference(got, torch.zeros(_START)) or "the result is no tensor")
    if tuple(got.shape) != (_START,):
        facts = "One score for each triplet: r numbers, without further dimensions."
        raise Refused(f"the scores have shape {tuple(got.shape)}, expected {(_START,)}", facts)
    if not all(map(torch.equal, arguments, before)):
        raise Refused("an argument was changed: leave all six as they were")
    if not got.isfinite().all():
        raise Refused(f"{(~got.isfinite()).sum()} of {_START} scores are NaN or infinite")
    return got.detach().float()


def _alike(got, scores):
    """Return whether two scores of a layer are the same but for a positive factor."""
    got, scores = (t / t.abs().max().clamp(min=1e-30) for t in (got.float(), scores))
    return bool((got - scores).abs().max() < 1e-3)


def _finds_the_ranks(function) -> str:
    found, seen = _found(function)
    right = sum(ranks == _RANKS for ranks in found)
    if right >= _ENOUGH:
        return f"ranks 4, 2, 0 in {right} of {_STARTS} random starts"
    headline = f"your score finds the ranks 4, 2, 0 in {right} of {_STARTS} random starts"
    common, times = Counter(found).most_common(1)[0]
    most = f"The most frequent ranks are {', '.join(map(str, common))}, in {times} of them"
    facts = [f"{most}; {_ENOUGH} right ones are enough."]
    if not all(_alike(function(*[t.clone() for t in args]), scores) for args, scores in seen):
        raise Refused(headline, *facts, "The same triplet gets another score in a second call.")
    named = [
        why
        for why, wrong in triplet_scores.causes.items()
        if all(_alike(wrong(*args), scores) for args, scores in seen)
    ]
    raise Refused(headline, *facts, *([f"Likely cause: {', or '.join(named)}."] if named else []))


@check_for(
    trials={_finds_the_ranks: "your function"},
    causes=mistakes(
        """
        def triplet_scores(Q, lam, P, dQ, dlam, dP):
            worth = (lam * dlam).abs()
            return worth.flatten()
        """,
        """
        the sign is reversed: the triplets with the lowest scores are pruned
            worth.flatten() → -worth.flatten()
        the score has a sign, which changes from batch to batch: take the absolute value
            (lam * dlam).abs() → lam * dlam
        λ has a sign, which p or q can turn round: take the absolute value
            (lam * dlam).abs() → lam
        this is the gradient alone, which is large where something is still missing: the triplet
        that is there must count, too
            (lam * dlam).abs() → dlam.abs()
        all triplets have the same score, so that the first layer keeps all
            worth.flatten() → torch.ones(len(lam))
        the scores are divided by a number of their own layer, so that a layer that needs nothing
        keeps as many as the others
            worth.flatten() → worth.flatten() / worth.sum().clamp(min=1e-12)
        the scores are ranks within a layer, so that each layer keeps as many as the others
            worth.flatten() → worth.flatten().argsort().argsort().float()
        """,
    ),
    verified=lambda facts: f"It finds the {facts[0]}.",
)
def triplet_scores(Q, lam, P, dQ, dlam, dP):
    """Pruning by this score leaves each layer the rank that it needs."""


# ------------------------------------------------------------------ adalora_step


class _Net(nn.Module):
    """Hold two linear layers and a loss, and be called as a Hugging Face model is."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 7)

    def forward(self, x, labels):
        y = self.down(self.up(x).tanh())
        return SequenceClassifierOutput(loss=F.mse_loss(y, labels), logits=y)


_SCHEDULE = AdaLoRA(4, 2, 24.0, ("up", "down"), tinit=1, tfinal=3, delta=2, total_steps=9)
_AT_ONCE = {"tinit": 0, "delta": 1, "orthogonal": 1e-7}
_NO_PENALTY = "the regulariser is left out: the loss is the task's plus allocator.penalty()"
_CLEARED = (
    "the gradients are cleared before the allocator looks at them: all scores are 0, and it "
    "prunes everything"
)


def _batch(seed):
    generator = torch.Generator().manual_seed(seed)
    x, labels = (torch.randn(16, n, generator=generator) for n in (8, 7))
    return {"x": x, "labels": labels}


def _step_case(step, note="", bug="", **changes):
    """Return a case of one step: a loss, which shows what the steps before have done. With changes
    of the schedule λ is not zero at the start, so that the penalty's tiny gradients do nothing."""

    def make():
        model = _Net()
        inject(model, replace(_SCHEDULE, **changes))
        injection = injection_of(model)
        if changes:
            for wrapper in injection.wrappers.values():
                nn.init.normal_(wrapper.ada.lora_E)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        return [model, _batch(0), optimizer, allocator_of(injection), step]

    def earlier(function, model, batch, optimizer, allocator, step):
        if bug == _NO_PENALTY:  # what another bug has done in earlier steps must not show
            function = adalora_step.reference
        with suppress(Exception):  # the call that counts meets the same
            for before in range(1, step):
                function(model, _batch(before), optimizer, allocator, before)
        return [model, batch, optimizer, allocator, step]

    return Case(make, note=note, earlier=earlier if step > 1 else None, bug=bug)


@check_for(
    cases=[
        _step_case(9, "the last step, after eight right ones; ranks are settled", _NO_PENALTY),
        _step_case(2, "after a first one that pruned; γ is tiny", _CLEARED, **_AT_ONCE),
        _step_case(1, note="the first step"),
        _step_case(2, note="the second step, after a first one with your function"),
        _step_case(3, note="after two steps, of which the second pruned for the first time"),
        _step_case(6, note="after five steps, of which two pruned"),
        _step_case(9, note="the last step: ranks are settled since the sixth"),
    ],
    returns="the loss",
    changes=("model",),
    tolerance=1e-4,
    causes=mistakes(
        """
        def adalora_step(model, batch, optimizer, allocator, step):
            task, extra = model(**batch).loss, allocator.penalty()
            loss = task + extra
            loss.backward()
            optimizer.step()
            allocator.update(step)
            optimizer.zero_grad(set_to_none=False)
            return loss.detach()
        """,
        """
        the regulariser is left out: the loss is the task's plus allocator.penalty()
            task + extra → task
        the regulariser is in the loss that is returned, but not in the gradients: add it
        before backward()
            loss.backward → task.backward
        the regulariser is added after optimizer.step(), too late for the gradients: add it
        before backward()
            loss.backward → task.backward
            optimizer.step() → optimizer.step(); loss = task + allocator.penalty()
        the regulariser is in the gradients, but not in the loss that is returned
            return loss → return task
        allocator.penalty() already includes its weight
            + extra → + allocator.method.orthogonal * extra
        the allocator is called before optimizer.step(), which brings back the pruned triplets
            optimizer.step() → ∅
            allocator.update(step) → allocator.update(step); optimizer.step()
        the allocator is one step behind: it counts from 1, as `step` does
            update(step) → update(step - 1)
        the allocator is one step ahead: `step` counts from 1 already
            update(step) → update(step + 1)
        the gradients are never cleared, and add up
            optimizer.zero_grad(set_to_none=False) → ∅
        nothing is learned: the optimiser takes no step, or finds its gradients cleared
            optimizer.step() → ∅
        """,
    ),
)
def adalora_step(model, batch, optimizer, allocator, step):
    """The loss with its regulariser, and the right weights and ranks at every step to the end."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    loss = allocator.penalty() + model(**batch).loss
    for p, grad in zip(trained, torch.autograd.grad(loss, trained), strict=True):
        p.grad = grad
    optimizer.step()
    allocator.update(step)
    for p in trained:
        p.grad = None
    return loss.detach()


# ------------------------------------------------------------------ spend_by_hand


def _map(*kept):
    stem = "bert.encoder.layer."
    names = ("attention.self.query", "attention.output.dense", "output.dense", "intermediate.dense")
    return {f"{stem}{i // 4}.{names[i % 4]}": rank for i, rank in enumerate(kept)}


@check_for(
    cases=[
        Case(lambda: [_map(4, 1, 6, 2), 4.0], note="every layer keeps something"),
        Case(lambda: [_map(3, 0, 6, 5, 0, 2), 2.5], note="two layers have rank 0"),
        Case(lambda: [_map(1, 8, 8), 1], note="scaling 1: α = r"),
        Case(lambda: [_map(0, 0, 7), 0.5], note="one layer is left"),
    ],
    causes=mistakes(
        """
        def spend_by_hand(ranks, scaling):
            kept = {path: rank for path, rank in ranks.items() if rank > 0}
            alphas = {path: scaling * rank for path, rank in kept.items()}
            targets = list(kept)
            return dict(target_modules=targets, rank_pattern=kept, alpha_pattern=alphas)
        """,
        """
        layers of rank 0 are kept: LoRA has no rank 0, so leave them out of all three
            if rank > 0 → ∅
        layers of rank 0 are still among the target modules: there they get the default rank
            list(kept) → list(ranks)
        layers of rank 0 are still in the rank pattern
            rank_pattern=kept → rank_pattern=ranks
        layers of rank 0 are still in the alpha pattern
            in kept.items() → in ranks.items()
        every branch has the same α, so α/r differs: α is the scaling times the rank
            scaling * rank → scaling
        α is the rank itself: multiply by the scaling
            scaling * rank → rank
        α is the scaling divided by the rank: α/r is the scaling, so multiply
            scaling * rank → scaling / rank
        α is the rank divided by the scaling: multiply
            scaling * rank → rank / scaling
        every branch has the α of the mean rank, so α/r differs from layer to layer
            scaling * rank → scaling * sum(kept.values()) / len(kept)
        """,
    ),
)
def spend_by_hand(ranks, scaling):
    """Every layer that keeps triplets gets its rank, and all have the same scaling α/r."""
    found = {"target_modules": [], "rank_pattern": {}, "alpha_pattern": {}}
    for path, rank in ranks.items():
        if rank:
            found["target_modules"].append(path)
            found["rank_pattern"][path] = rank
            found["alpha_pattern"][path] = rank * scaling
    return found
