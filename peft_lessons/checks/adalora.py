"""Checks of lesson 05."""

from contextlib import suppress
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from ..engine import inject, injection_of
from ..methods.adalora import AdaLoRA, allocator_of
from .kit import Case, check_for

# ------------------------------------------------------------------ orthogonality_penalty


def _identity(gram):
    return torch.eye(len(gram), dtype=gram.dtype)


def _penalty(p=lambda P: P.T @ P, q=lambda Q: Q @ Q.T, less=_identity, of=None, join=None):
    """A wrong orthogonality_penalty by one of its steps."""
    of = of or (lambda gap: (gap**2).sum())
    join = join or (lambda a, b: a + b)
    return lambda P, Q: join(*(of(gram - less(gram)) for gram in (p(P), q(Q))))


def _vectors(out, in_, rank, near=0.0, dtype=torch.float32):
    """P and Q, drawn, or so `near` to orthonormal that their Gram matrices are nearly I."""
    P, Q = torch.randn(out, rank, dtype=dtype), torch.randn(rank, in_, dtype=dtype)
    if near:
        P = torch.linalg.qr(P).Q + near * torch.randn(out, rank, dtype=dtype)
        Q = torch.linalg.qr(Q.T).Q.T + near * torch.randn(rank, in_, dtype=dtype)
    else:
        P, Q = P / 3, Q / 4
    return [P, Q]


@check_for(
    cases=[
        Case(lambda: _vectors(12, 20, 4)),
        Case(lambda: _vectors(30, 8, 5, near=0.1), note="nearly orthonormal"),
        Case(lambda: _vectors(6, 6, 6), note="as many triplets as the layer is wide"),
        Case(lambda: _vectors(9, 7, 1), note="a single triplet"),
        Case(lambda: _vectors(10, 16, 3, dtype=torch.float64)),
    ],
    gradients=("P", "Q"),
    causes={
        "the norms are not squared: that is PEFT's form, the paper's has squares": _penalty(
            of=torch.norm
        ),
        "this is PEFT's form, the mean of two norms: the paper adds their squares": _penalty(
            of=torch.norm, join=lambda a, b: (a + b) / 2
        ),
        "this is half of it: add the two terms, without a mean or a weight": _penalty(
            join=lambda a, b: (a + b) / 2
        ),
        "the squares are averaged over the entries: the Frobenius norm adds them": _penalty(
            of=lambda gap: (gap**2).mean()
        ),
        "absolute values are added, not squares": _penalty(of=lambda gap: gap.abs().sum()),
        "one root is taken of the whole: leave it squared": _penalty(
            join=lambda a, b: (a + b).sqrt()
        ),
        "this is the spectral norm, the largest singular value: take all of the entries": _penalty(
            of=lambda gap: torch.linalg.matrix_norm(gap, 2) ** 2
        ),
        "Q has its vectors in its rows: QQᵀ is (r, r), and QᵀQ (in, in) cannot become I": _penalty(
            q=lambda Q: Q.T @ Q
        ),
        (
            "P has its vectors in its columns: PᵀP is (r, r), and PPᵀ (out, out) cannot become I"
        ): _penalty(p=lambda P: P @ P.T),
        "both products are turned: those of shape (r, r) are wanted, PᵀP and QQᵀ": _penalty(
            p=lambda P: P @ P.T, q=lambda Q: Q.T @ Q
        ),
        "I is not subtracted": _penalty(less=lambda gram: 0),
        "1 is subtracted from every entry: I is 0 off the diagonal": _penalty(less=lambda gram: 1),
        "only the off-diagonal entries count: the lengths must become 1 too": _penalty(
            less=lambda gram: gram.diagonal().diag()
        ),
        "only the diagonal counts: vectors must be orthogonal to one another too": _penalty(
            p=lambda P: (P**2).sum(0).diag(), q=lambda Q: (Q**2).sum(1).diag()
        ),
        "only P is penalised": _penalty(join=lambda a, b: a),
        "only Q is penalised": _penalty(join=lambda a, b: b),
        "the norm of the two differences' sum is taken: each has its own": lambda P, Q: (
            (P.T @ P + Q @ Q.T - 2 * _identity(Q @ Q.T)) ** 2
        ).sum(),
    },
)
def orthogonality_penalty(P, Q):
    """The squared distance from orthonormal, of the columns of P and the rows of Q."""
    total = torch.zeros((), dtype=P.dtype)
    for vectors in (P.T, Q):
        for i, one in enumerate(vectors):
            for j, other in enumerate(vectors):
                total = total + (torch.dot(one, other) - float(i == j)) ** 2
    return total


# ------------------------------------------------------------------ update_importance


def _smoothed(old, new, beta):
    return beta * old + (1 - beta) * new


def _updating(
    importance=lambda w, g: (w * g).abs(),
    smoothed=_smoothed,
    doubt=lambda now, new, old: (now - new).abs(),
    betas=lambda b1, b2: (b1, b2),
    score=lambda s, u, s_old, u_old: s * u,
    order=lambda s, u, score: (s, u, score),
):
    """A wrong update_importance by one of its steps."""

    def update(weight, grad, sensitivity, uncertainty, beta1, beta2):
        first, second = betas(beta1, beta2)
        now = importance(weight, grad)
        s = smoothed(sensitivity, now, first)
        u = smoothed(uncertainty, doubt(now, s, sensitivity), second)
        return order(s, u, score(s, u, sensitivity, uncertainty))

    return update


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
    causes={
        "the uncertainty measures from the old sensitivity: take the new one": _updating(
            doubt=lambda now, new, old: (now - old).abs()
        ),
        "the uncertainty is not an absolute value": _updating(
            doubt=lambda now, new, old: now - new
        ),
        "the deviation is squared, as in a variance: take its absolute value": _updating(
            doubt=lambda now, new, old: (now - new) ** 2
        ),
        "the uncertainty averages the importance itself, not its deviation": _updating(
            doubt=lambda now, new, old: now
        ),
        (
            "the deviation is the change of the average: take that of this step's importance"
        ): _updating(doubt=lambda now, new, old: (new - old).abs()),
        "the importance has a sign: take the absolute value of weight · grad": _updating(
            importance=lambda w, g: w * g
        ),
        "the weight is left out of the importance": _updating(lambda w, g: g.abs()),
        "the gradient is left out of the importance": _updating(lambda w, g: w.abs()),
        "the importance is squared": _updating(lambda w, g: (w * g) ** 2),
        "β and 1 − β have changed places: β is the share of the past": _updating(
            smoothed=lambda old, new, beta: (1 - beta) * old + beta * new
        ),
        "the new value is not multiplied by 1 − β": _updating(
            smoothed=lambda old, new, beta: beta * old + new
        ),
        "the past is not multiplied by β": _updating(
            smoothed=lambda old, new, beta: old + (1 - beta) * new
        ),
        "the averages are divided by 1 − β as in Adam: here nothing is corrected": _updating(
            smoothed=lambda old, new, beta: _smoothed(old, new, beta) / (1 - beta)
        ),
        "beta1 and beta2 have changed places": _updating(betas=lambda b1, b2: (b2, b1)),
        "beta1 smooths both: the uncertainty has beta2": _updating(betas=lambda b1, b2: (b1, b1)),
        "beta2 smooths both: the sensitivity has beta1": _updating(betas=lambda b1, b2: (b2, b2)),
        "the score is the product of the old averages: take the new ones": _updating(
            score=lambda s, u, s_old, u_old: s_old * u_old
        ),
        "the score is a sum: multiply": _updating(score=lambda s, u, s_old, u_old: s + u),
        "the score is the sensitivity alone: multiply by the uncertainty": _updating(
            score=lambda s, u, s_old, u_old: s
        ),
        "the score is a ratio, less where it is less certain: AdaLoRA multiplies": _updating(
            score=lambda s, u, s_old, u_old: s / (u + 1e-12)
        ),
        "sensitivity and uncertainty have changed places": _updating(
            order=lambda s, u, score: (u, s, score)
        ),
        "the order is turned: the score comes last": _updating(
            order=lambda s, u, score: (score, s, u)
        ),
    },
)
def update_importance(weight, grad, sensitivity, uncertainty, beta1, beta2):
    """Both averages moved on by one step, and their product, entry by entry."""
    now = grad.mul(weight).abs()
    new_sensitivity = sensitivity + (1 - beta1) * (now - sensitivity)
    deviation = torch.maximum(now - new_sensitivity, new_sensitivity - now)
    new_uncertainty = uncertainty + (1 - beta2) * (deviation - uncertainty)
    return new_sensitivity, new_uncertainty, new_sensitivity * new_uncertainty


# ------------------------------------------------------------------ cubic_budget


def _budget(left=None, curve=lambda left: left**3, rounded=int, before=True, after=True):
    """A wrong cubic_budget by one of its steps."""
    left = left or (
        lambda step, tinit, tfinal, total: 1 - (step - tinit) / (total - tfinal - tinit)
    )

    def budget(step, initial, final, tinit, tfinal, total):
        if before and step <= tinit:
            return initial
        if after and step >= total - tfinal:
            return final
        return rounded((initial - final) * curve(left(step, tinit, tfinal, total)) + final)

    return budget


def _rounded_up(value):
    return -int(-value // 1)


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
        Case(lambda: [50, 5000, 1000, 0, 0, 100], note="no start, no end: half of the way"),
        Case(lambda: [7, 90, 6, 3, 5, 20]),
        Case(lambda: [100, 5000, 1000, 0, 0, 100], note="the last of all steps"),
    ],
    causes={
        "the budget stays at `initial`: // drops the fraction, or what is done is cubed": _budget(
            curve=lambda left: 1
        ),
        "the way is linear: take the cube of what is left": _budget(curve=lambda left: left),
        "the way is quadratic, not cubic": _budget(curve=lambda left: left**2),
        "1 − x³ prunes slowly first: (1 − x)³ is wanted, the cube of what is left": _budget(
            curve=lambda left: 1 - (1 - left) ** 3
        ),
        "the budget rises: of what is left of the way take the cube, not of what is done": _budget(
            curve=lambda left: (1 - left) ** 3
        ),
        "the result is rounded to the nearest: round down": _budget(rounded=round),
        "the result is rounded up: round down": _budget(rounded=_rounded_up),
        "the result is a float: triplets are whole": _budget(rounded=float),
        "the way ends at total: it ends tfinal steps earlier": _budget(
            lambda step, tinit, tfinal, total: 1 - (step - tinit) / (total - tinit)
        ),
        "the way is total − tfinal long: it begins after tinit steps": _budget(
            lambda step, tinit, tfinal, total: 1 - (step - tinit) / (total - tfinal)
        ),
        "the way is counted from step 0: it begins after tinit steps": _budget(
            lambda step, tinit, tfinal, total: 1 - step / (total - tfinal)
        ),
        "tfinal is subtracted from the step too, as the paper's formula is often printed": _budget(
            lambda step, tinit, tfinal, total: (
                1 - (step - tinit - tfinal) / (total - tinit - tfinal)
            )
        ),
        "this is one step late: steps count from 1": _budget(
            lambda step, tinit, tfinal, total: 1 - (step - 1 - tinit) / (total - tfinal - tinit)
        ),
        "before tinit there is no way yet, and the cube exceeds the initial budget": _budget(
            before=False
        ),
        (
            "after total − tfinal what is left is negative, and so is its cube: stay at `final`"
        ): _budget(after=False),
        (
            "neither end is held: until tinit the budget is `initial`, from total − tfinal `final`"
        ): _budget(before=False, after=False),
        "`final` is not added: the cube is of the part that goes": (
            lambda step, initial, final, tinit, tfinal, total: _budget()(
                step, initial - final, 0, tinit, tfinal, total
            )
        ),
        "`initial` is multiplied by the cube: only initial − final goes": (
            lambda step, initial, final, tinit, tfinal, total: _budget()(
                step, initial + final, final, tinit, tfinal, total
            )
        ),
        "initial and final have changed places": (
            lambda step, initial, final, tinit, tfinal, total: _budget()(
                step, final, initial, tinit, tfinal, total
            )
        ),
    },
)
def cubic_budget(step, initial, final, tinit, tfinal, total):
    """The number of triplets that may stay, at the start, on the way and at the end."""
    way, gone = total - tfinal - tinit, min(max(step - tinit, 0), total - tfinal - tinit)
    # In whole numbers, so that nothing is rounded before the end.
    return final + (initial - final) * (way - gone) ** 3 // way**3


# ------------------------------------------------------------------ mask_to_budget


def _split(flat, scores):
    return list(flat.split([len(score) for score in scores]))


def _masking(kept):
    """A wrong mask_to_budget from which of the pooled scores it keeps."""

    def mask(scores, budget):
        return _split(kept(torch.cat(scores), budget), scores)

    return mask


def _chosen(pooled, order, budget):
    mask = torch.zeros(len(pooled), dtype=torch.bool)
    mask[order[:budget]] = True
    return mask


def _order(pooled, descending=True):
    return pooled.argsort(descending=descending, stable=True)


def _best(pooled, budget):
    return _chosen(pooled, _order(pooled), budget)


def _cut(pooled, budget):
    """The threshold of PEFT: the best score of those that go."""
    return pooled.sort().values[len(pooled) - budget - 1] if budget < len(pooled) else -torch.inf


def _each(scores, budget):
    share = budget // len(scores)
    return [_best(score, share) for score in scores]


def _in_proportion(scores, budget):
    total = sum(map(len, scores))
    return [_best(score, round(budget * len(score) / total)) for score in scores]


def _in_turn(scores, budget):
    masks = []
    for score in scores:
        masks.append(_best(score, budget))
        budget -= int(masks[-1].sum())
    return masks


def _normalised(scores, budget):
    pooled = torch.cat([score / score.sum() for score in scores])
    return _split(_best(pooled, budget), scores)


def _scores(*sizes):
    """Layers of very different importance, so that a share for each layer is wrong."""
    return [10 ** (2 * torch.rand(1) - 1) * torch.rand(size) for size in sizes]


def _ties():
    return [torch.tensor(s) for s in ([3.0, 1.0, 2.0], [2.0, 2.0, 5.0, 0.5], [2.0, 4.0])]


@check_for(
    cases=[
        Case(lambda: [_scores(6, 6, 6, 6), 12], note="four layers"),
        Case(lambda: [_scores(4, 9, 2), 7], note="layers of 4, 9 and 2 triplets"),
        Case(lambda: [_scores(5, 5), 10], note="all may stay"),
        Case(lambda: [_scores(5, 3), 0], note="none may stay"),
        Case(lambda: [_scores(8), 1], note="one layer, one triplet"),
        Case(lambda: [[-s for s in _scores(5, 6)], 4], note="all scores are negative"),
        Case(lambda: [_ties(), 5], note="of four scores 2.0 two may stay"),
        Case(lambda: [[torch.zeros(30), torch.zeros(40)], 50], note="all scores are 0"),
    ],
    returns="masks",
    causes={
        "every layer keeps the same number: rank all layers together": _each,
        "every layer keeps a share of its own size: rank all layers together": _in_proportion,
        "the first layers take the budget, whatever their scores: rank all together": _in_turn,
        (
            "the scores are normalised within each layer, which makes all layers equally good"
        ): _normalised,
        "the worst are kept, not the best": _masking(
            lambda pooled, b: _chosen(pooled, _order(pooled, descending=False), b)
        ),
        "scores are compared without their signs": _masking(
            lambda pooled, budget: _best(pooled.abs(), budget)
        ),
        "what has no score above 0 goes, though the budget has room for it": _masking(
            lambda pooled, budget: _best(pooled, budget) & (pooled > 0)
        ),
        "the mask tells what goes: True is for what stays": _masking(
            lambda pooled, budget: ~_best(pooled, budget)
        ),
        "the budget is taken for the number that goes": _masking(
            lambda pooled, budget: _best(pooled, len(pooled) - budget)
        ),
        "one too many stays: at the threshold itself a comparison with >= keeps one more": _masking(
            lambda pooled, budget: pooled >= _cut(pooled, budget)
        ),
        "one too few stays": _masking(lambda pooled, budget: _best(pooled, max(0, budget - 1))),
        (
            "scores that are equal at the edge all go, as in PEFT: here the budget is used up"
        ): _masking(lambda pooled, budget: pooled > _cut(pooled, budget)),
        "scores that are equal at the edge all stay: that is above the budget": _masking(
            lambda pooled, budget: pooled >= (pooled.sort().values[-budget] if budget else 9e9)
        ),
        "of equal scores the last ones stay, and the first ones should": _masking(
            lambda pooled, b: _chosen(pooled, len(pooled) - 1 - _order(pooled.flip(0)), b)
        ),
        (
            "which of several equal scores topk or an unstable sort takes is not defined: take "
            "argsort with stable=True"
        ): _masking(lambda pooled, budget: _chosen(pooled, pooled.topk(budget).indices, budget)),
        "the masks are in the order of the scores, not in that of the triplets": _masking(
            lambda pooled, budget: torch.arange(len(pooled)) < budget
        ),
        (
            "argsort lists which triplet comes where, not the place of each: order[:budget] stays"
        ): _masking(lambda pooled, budget: _order(pooled) < budget),
        "[-0:] takes everything: with a budget of 0 nothing stays": _masking(
            lambda pooled, budget: _best(pooled, budget or len(pooled))
        ),
        (
            "chunk cuts into equal parts: layers differ in size, and split takes their sizes"
        ): lambda scores, budget: list(_best(torch.cat(scores), budget).chunk(len(scores))),
        "the masks are one flat tensor: split it by layers": lambda scores, budget: _best(
            torch.cat(scores), budget
        ),
        "these are numbers, 0 and 1: a mask is of dtype bool": _masking(
            lambda pooled, budget: _best(pooled, budget).to(pooled.dtype)
        ),
        (
            "these are the scores that stay, with zeros for the others: a mask is of dtype bool"
        ): _masking(lambda pooled, budget: pooled * _best(pooled, budget)),
    },
)
def mask_to_budget(scores, budget):
    """Exactly `budget` triplets stay, the best of all layers, and the first ones of equals."""
    places = [(i, j) for i, score in enumerate(scores) for j in range(len(score))]
    places.sort(key=lambda place: -scores[place[0]][place[1]].item())  # Python's sort is stable
    masks = [torch.zeros(len(score), dtype=torch.bool) for score in scores]
    for i, j in places[:budget]:
        masks[i][j] = True
    return masks


# ------------------------------------------------------------------ adalora_step


class _Net(nn.Module):
    """Two linear layers and a loss, called as a Hugging Face model is."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 7)

    def forward(self, x, labels):
        y = self.down(self.up(x).tanh())
        return SimpleNamespace(loss=F.mse_loss(y, labels), logits=y)


_SCHEDULE = AdaLoRA(4, 2, 24.0, ("up", "down"), tinit=1, tfinal=3, delta=2, total_steps=9)


def _batch(seed):
    generator = torch.Generator().manual_seed(seed)
    x, labels = (torch.randn(16, n, generator=generator) for n in (8, 7))
    return {"x": x, "labels": labels}


def _step_case(step, note=""):
    def make():
        model = _Net()
        inject(model, _SCHEDULE)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        return [model, _batch(0), optimizer, allocator_of(injection_of(model)), step]

    def earlier(function, model, batch, optimizer, allocator, step):
        with suppress(Exception):  # the call that counts meets the same
            for before in range(1, step):
                function(model, _batch(before), optimizer, allocator, before)
        return [model, batch, optimizer, allocator, step]

    return Case(make, note=note, earlier=earlier if step > 1 else None)


def _stepping(order="bsuz", penalty=1.0, trained=None, shift=0, told=None, keep=False):
    """A wrong adalora_step by the order of (b)ackward, (s)tep, (u)pdate and (z)ero_grad, and by
    what it trains on and returns."""
    trained = penalty if trained is None else trained
    told = penalty if told is None else told

    def run(model, batch, optimizer, allocator, step):
        task, extra = model(**batch).loss, allocator.penalty()
        loss = task + told * extra
        for action in order:
            if action == "b":
                (task + trained * extra).backward()
            elif action == "s":
                optimizer.step()
            elif action == "u":
                allocator.update(step + shift)
            else:
                # Kept as zeros: without any gradient the allocator itself would complain.
                optimizer.zero_grad(set_to_none=False)
        return loss.detach()

    return run


_CLEARED = (
    "the gradients are cleared before the allocator looks at them: all scores are 0, and it "
    "prunes everything"
)


@check_for(
    cases=[
        _step_case(1, note="the first step"),
        _step_case(2, note="the second step, after a first one with your function"),
        _step_case(3, note="after two steps, of which the second pruned for the first time"),
        _step_case(6, note="after five steps, of which two pruned"),
        _step_case(9, note="the last step: ranks are settled since the sixth"),
    ],
    returns="the loss",
    changes=("model",),
    tolerance=1e-4,
    causes={
        f"the regulariser is left out; and {_CLEARED}": _stepping("bszu", penalty=0),
        "the regulariser is left out: the loss is the task's plus allocator.penalty()": _stepping(
            penalty=0
        ),
        _CLEARED: _stepping("bszu"),
        (
            "the regulariser is in the loss that is returned, but not in the gradients: add it "
            "before backward()"
        ): _stepping(trained=0),
        "the regulariser is in the gradients, but not in the loss that is returned": _stepping(
            told=0
        ),
        "allocator.penalty() has its weight in it already": _stepping(penalty=_SCHEDULE.orthogonal),
        "the regulariser is subtracted": _stepping(penalty=-1.0),
        (
            "the allocator is called before optimizer.step(), which brings back what it pruned"
        ): _stepping("busz"),
        "the allocator is never called: no rank ever changes": _stepping("bsz"),
        "the allocator is one step behind: it counts from 1, as `step` does": _stepping(shift=-1),
        "the allocator is one step ahead: `step` counts from 1 already": _stepping(shift=1),
        "the gradients are never cleared, and add up": _stepping("bsu"),
        (
            "nothing is learned: the optimiser takes no step, or finds its gradients cleared"
        ): _stepping("buz"),
    },
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
