"""Checks of lesson 08."""

import math

import torch
from torch.nn import functional as F

from .kit import Case, check_for, refused


def _table(vocabulary, width, zero=None, dtype=torch.float32):
    """Rows of very different lengths, in which a dot product and a cosine choose differently."""
    lengths = torch.logspace(-1, 1, vocabulary)[torch.randperm(vocabulary), None]
    table = F.normalize(torch.randn(vocabulary, width)) * lengths
    if zero is not None:
        table[zero] = 0
    return table.to(dtype)


# ------------------------------------------------------------------ nearest_tokens


def _cosines(prompt, table):
    return F.normalize(prompt) @ F.normalize(table).T


def _top(score, largest=True):
    def nearest_tokens(prompt, embeddings, k):
        return score(prompt, embeddings).topk(k, dim=1, largest=largest).indices

    return nearest_tokens


def _moved(p, vocabulary, width, k, **settings):
    """A prompt as training leaves it: tokens of the table, moved and stretched."""
    table = _table(vocabulary, width, **settings)
    start = F.normalize(table[torch.randperm(vocabulary)[:p]])
    stretch = torch.logspace(-1, 1, p, dtype=table.dtype)[:, None]
    return [(start + 0.2 * torch.randn_like(start)) * stretch, table, k]


@check_for(
    cases=[
        Case(lambda: _moved(3, 40, 12, 4)),
        Case(lambda: _moved(7, 30, 9, 1), note="one token a row"),
        Case(lambda: _moved(8, 8, 8, 5), note="as many virtual tokens as tokens"),
        Case(lambda: _moved(5, 25, 6, 25, zero=0), note="the row of the padding token is zero"),
        Case(lambda: _moved(4, 33, 10, 6, dtype=torch.float64)),
        Case(lambda: _moved(1, 20, 5, 3), note="a single virtual token"),
    ],
    returns="the table of ids",
    causes={
        "this is a dot product, which prefers long rows: divide them by their lengths": _top(
            lambda P, E: P @ E.T
        ),
        "this is the Euclidean distance: a row that training stretched has other neighbours": _top(
            lambda P, E: torch.cdist(P, E), largest=False
        ),
        "these are the least similar tokens": _top(_cosines, largest=False),
        "the order is turned: the most similar token comes first": lambda P, E, k: _top(_cosines)(
            P, E, k
        ).flip(1),
        "the ids are sorted: the order is that of the similarity": lambda P, E, k: (
            _top(_cosines)(P, E, k).sort(dim=1).values
        ),
        "the columns are normalised, not the rows: a token is a row": _top(
            lambda P, E: F.normalize(P, dim=0) @ F.normalize(E, dim=0).T
        ),
        "these are the similarities: return their ids": lambda P, E, k: (
            _cosines(P, E).topk(k, dim=1).values
        ),
        "the cosine has lost its sign: the opposite of a token is not near it": _top(
            lambda P, E: _cosines(P, E).abs()
        ),
        (
            "a row of zeros has no direction: divided by its length it is NaN, which topk takes "
            "for the largest; its cosine is 0"
        ): _top(lambda P, E: (P / P.norm(dim=1)[:, None]) @ (E / E.norm(dim=1)[:, None]).T),
        "every row gets the tokens nearest to the mean of the prompt": lambda P, E, k: _top(
            _cosines
        )(P.mean(0, keepdim=True), E, k).expand(len(P), -1),
        "the result is transposed: one row a virtual token": lambda P, E, k: (
            _top(_cosines)(P, E, k).T
        ),
        "one token a row is a column too: keep the shape (p, k)": lambda P, E, k: (
            _cosines(P, E).topk(k, dim=1).indices.squeeze(1)
        ),
    },
)
def nearest_tokens(prompt, embeddings, k):
    """Each virtual token is read as the k tokens of the smallest angle to it, nearest first."""
    rows = []
    for row in prompt.double():
        angles = []
        for token, vector in enumerate(embeddings.double()):
            length = math.sqrt(float(row @ row)) * math.sqrt(float(vector @ vector))
            angles.append((-float(row @ vector) / length if length else 0.0, token))
        rows.append([token for _, token in sorted(angles)[:k]])
    return torch.tensor(rows)


# ------------------------------------------------------------------ init_from_text


def _text(n, vocabulary, width, p, dtype=torch.float32):
    ids = torch.randperm(vocabulary)[:n]
    return [ids, torch.randn(vocabulary, width).to(dtype), p]


def _chosen(which):
    return lambda ids, embeddings, p: embeddings[which(ids, p)]


def _padded(rows, p):
    return F.pad(rows, (0, 0, 0, max(0, p - len(rows))))[:p]


@check_for(
    cases=[
        Case(lambda: _text(4, 30, 6, 11), note="the text is repeated, the last time cut off"),
        Case(lambda: _text(9, 30, 6, 4), note="the text is cut off"),
        Case(lambda: _text(5, 20, 5, 5), note="the text has p tokens"),
        Case(lambda: _text(3, 20, 7, 9), note="the text fits three times"),
        Case(lambda: _text(1, 20, 7, 3), note="a text of one token"),
        Case(lambda: _text(6, 15, 8, 14, torch.float64)),
        refused(
            lambda: [torch.zeros(0, dtype=torch.long), torch.randn(9, 4), 3],
            "ids",
            "a text of no tokens",
        ),
    ],
    returns="the prompt",
    causes={
        "each token is repeated by itself: repeat the text as a whole, a b c a b c": _chosen(
            lambda ids, p: ids.repeat_interleave(math.ceil(p / len(ids)))[:p]
        ),
        "what the text leaves empty is zero: repeat the text": lambda ids, E, p: _padded(E[ids], p),
        "the last token is repeated: repeat the text from its beginning": _chosen(
            lambda ids, p: ids[torch.arange(p).clamp(max=len(ids) - 1)]
        ),
        "the first token is repeated: repeat the whole text": _chosen(
            lambda ids, p: torch.cat([ids, ids[:1].repeat(p)])[:p]
        ),
        "a long text keeps its last p tokens: PEFT keeps the first p": _chosen(
            lambda ids, p: ids[-p:] if len(ids) > p else ids.repeat(p)[:p]
        ),
        "the repeated text loses its beginning: cut off its end": _chosen(
            lambda ids, p: ids.repeat(math.ceil(p / len(ids)))[-p:]
        ),
        "the text is repeated but not cut off to p": _chosen(
            lambda ids, p: ids.repeat(math.ceil(p / len(ids)))
        ),
        "the text is repeated too rarely: round the number of repetitions up": _chosen(
            lambda ids, p: ids.repeat(max(1, p // len(ids)))[:p]
        ),
        "a short text is not repeated: the prompt has p rows": _chosen(lambda ids, p: ids[:p]),
        "every row is the mean of the text": lambda ids, E, p: E[ids].mean(0).repeat(p, 1),
        "the text is stretched over p rows: repeat it": _chosen(
            lambda ids, p: ids[torch.arange(p) * len(ids) // p]
        ),
        "the second repetition runs backwards": _chosen(
            lambda ids, p: torch.cat([ids, ids.flip(0)]).repeat(p)[:p]
        ),
        "the text begins with its second token": _chosen(
            lambda ids, p: ids[(torch.arange(p) + 1) % len(ids)]
        ),
        "these are the ids: return their embeddings": lambda ids, E, p: ids.repeat(p)[:p],
        "these are the first rows of the table, not those of the ids": lambda ids, E, p: E[
            torch.arange(p) % len(ids)
        ],
    },
)
def init_from_text(ids, embeddings, p):
    """The start is the text's embeddings, repeated or cut off as PEFT does."""
    if not len(ids):
        raise ValueError("ids is empty")
    rows = []
    while len(rows) < p:
        for token in ids.tolist():
            rows.append(embeddings[token])
    return torch.stack(rows[:p])


# ------------------------------------------------------------------ prompt_ensemble


def _prompts(weights, p, width, dtype=torch.float32):
    scales = torch.logspace(-0.5, 0.5, len(weights))
    return [[(s * torch.randn(p, width)).to(dtype) for s in scales], weights]


def _mixed(mix):
    def prompt_ensemble(prompts, weights):
        return mix(torch.stack(prompts), torch.tensor(weights).to(prompts[0])[:, None, None])

    return prompt_ensemble


def _mean(P, w):
    return (w * P).sum(0) / w.sum()


@check_for(
    cases=[
        Case(lambda: _prompts([0.3, 0.7], 4, 6)),
        Case(lambda: _prompts([1.0, 2.0, 5.0], 5, 3), note="weights that do not sum to 1"),
        Case(lambda: _prompts([2, 0, 1, 4], 4, 4), note="one weight is 0"),
        Case(lambda: _prompts([3.0], 2, 7), note="a single prompt"),
        Case(lambda: _prompts([0.1, 0.2, 0.5], 3, 5, torch.float64)),
        refused(
            lambda: [_prompts([1, 1], 3, 4)[0], [1.0]], "weights", "one weight for two prompts"
        ),
        refused(lambda: _prompts([0.0, 0.0], 3, 4), "weights", "all weights are 0"),
        refused(lambda: _prompts([2.0, -1.0], 3, 4), "weights", "a negative weight"),
        refused(
            lambda: [[torch.ones(3, 4), torch.ones(1, 4)], [1.0, 1.0]],
            "prompts",
            "prompts of 3 and of 1 token, which would broadcast",
        ),
    ],
    returns="the prompt",
    gradients=("prompts",),
    causes={
        (
            "the weights are not divided by their sum: a mean of equal prompts must be that prompt"
        ): _mixed(lambda P, w: (w * P).sum(0)),
        (
            "the weighted sum is divided by the number of prompts: divide by the sum of weights"
        ): _mixed(lambda P, w: (w * P).mean(0)),
        "the weights are not used: this is the plain mean": _mixed(lambda P, w: P.mean(0)),
        "the weights go through a softmax: 1 and 2 must count as one third and two thirds": _mixed(
            lambda P, w: (w.softmax(0) * P).sum(0)
        ),
        "the weights are squared": _mixed(lambda P, w: _mean(P, w * w)),
        "the weights are normalised by their Euclidean length": _mixed(
            lambda P, w: (w * P).sum(0) / w.norm()
        ),
        "each prompt is divided by its norm: its length is part of what it has learned": _mixed(
            lambda P, w: _mean(P / P.norm(dim=(1, 2), keepdim=True), w)
        ),
        "each row is divided by its length, which is part of what it has learned": _mixed(
            lambda P, w: _mean(F.normalize(P, dim=2), w)
        ),
        "the weights are turned: the first belongs to the first prompt": _mixed(
            lambda P, w: _mean(P, w.flip(0))
        ),
        "only the prompt of the largest weight is used": _mixed(lambda P, w: P[w.argmax()]),
        "the prompts are put one after the other: the mean has p rows": _mixed(
            lambda P, w: (w / w.sum() * P).flatten(0, 1)
        ),
        "the prompts are stacked, not summed": _mixed(lambda P, w: w / w.sum() * P),
        "the rows are averaged too: each virtual token has its own mean": _mixed(
            lambda P, w: _mean(P, w).mean(0)
        ),
    },
)
def prompt_ensemble(prompts, weights):
    """The weighted mean of prompts, row by row."""
    if len(prompts) != len(weights) or any(w < 0 for w in weights) or not any(weights):
        raise ValueError("weights")
    if any(prompt.shape != prompts[0].shape for prompt in prompts):
        raise ValueError("prompts")
    total = math.fsum(weights)
    shares = torch.tensor([w / total for w in weights], dtype=prompts[0].dtype)
    return torch.einsum("k,kpd->pd", shares, torch.stack(prompts))


# ------------------------------------------------------------------ prepend_prompt


def _batch(batch, length, width, p, left=True, dtype=torch.float32, mask=True, labels=True):
    """A padded batch; its labels are no copy of anything else."""
    kept = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        kept[row, : row % length] = 0
    kept = kept if left else kept.flip(1)
    ids = torch.randint(3, 99, (batch, length)).masked_fill(kept == 0, -100)
    embeddings = torch.randn(batch, length, width).to(dtype)
    prompt = 2 * torch.randn(p, width)
    return [embeddings, kept if mask else None, ids if labels else None, prompt]


_PARTS = ("the mask", "the labels", "the embeddings")


def _seen(result):
    embeddings, mask, labels = result
    return dict(zip(_PARTS, (mask, labels, embeddings), strict=True))


def _before(rows, p, value):
    return None if rows is None else F.pad(rows, (p, 0), value=value)


def _put(E, P):
    return torch.cat([P.to(E.dtype).expand(len(E), -1, -1), E], 1)


def _joined(
    mask=lambda mask, p: _before(mask, p, 1),
    labels=lambda labels, p: _before(labels, p, -100),
    embeddings=lambda E, mask, P: _put(E, P),
):
    def prepend_prompt(E, m, y, P):
        return embeddings(E, m, P), mask(m, len(P)), labels(y, len(P))

    return prepend_prompt


def _where(rows, then):
    return None if rows is None else then(rows)


def _weakened(E, mask, P, shared):
    """Rows with padding get less of the prompt; `shared`: all of them, and more each time."""
    if mask is None:
        return _put(E, P)
    share = mask.to(P.dtype).mean(1)
    share = share.prod().expand(len(E)) if shared else share
    return torch.cat([share[:, None, None] * P[None].to(E.dtype), E], 1).to(E.dtype)


@check_for(
    cases=[
        Case(lambda: _batch(3, 5, 4, 2), note="padded on the left"),
        Case(lambda: _batch(4, 3, 6, 5, left=False), note="padded on the right"),
        Case(lambda: _batch(1, 6, 6, 6), note="a single row"),
        Case(lambda: _batch(3, 4, 3, 1, mask=False), note="no mask"),
        Case(lambda: _batch(2, 4, 5, 3, labels=False), note="no labels"),
        Case(lambda: _batch(3, 4, 5, 2, dtype=torch.float64), note="another dtype than the prompt"),
    ],
    returns=("embeddings", "mask", "labels"),
    view=_seen,
    staged=True,
    gradients=("embeddings", "prompt"),
    causes={
        "the mask is not lengthened: p ones belong before each of its rows": _joined(
            mask=lambda m, p: m
        ),
        "the mask's ones are put behind the text: the prompt stands before it": _joined(
            mask=lambda m, p: _where(m, lambda m: F.pad(m, (0, p), value=1))
        ),
        "the mask hides the prompt: its places get ones": _joined(
            mask=lambda m, p: _before(m, p, 0)
        ),
        "the mask is all ones: the padding of the text is seen": _joined(
            mask=lambda m, p: _where(m, lambda m: torch.ones_like(F.pad(m, (p, 0))))
        ),
        "the mask begins as the text's does, so a padded row hides its prompt": _joined(
            mask=lambda m, p: _where(m, lambda m: torch.cat([m[:, :1]] * p + [m], 1))
        ),
        "the labels are not lengthened: p times -100 belongs before each row": _joined(
            labels=lambda y, p: y
        ),
        "the labels are shifted against the text: -100 belongs before them, not behind": _joined(
            labels=lambda y, p: _where(y, lambda y: F.pad(y, (0, p), value=-100))
        ),
        "the prompt's labels are 0, a token of the vocabulary: -100 leaves them out": _joined(
            labels=lambda y, p: _before(y, p, 0)
        ),
        "the prompt's labels are -1: the loss leaves out -100 only": _joined(
            labels=lambda y, p: _before(y, p, -1)
        ),
        (
            "the labels of the last virtual token are the text's first: the model shifts by itself"
        ): _joined(
            labels=lambda y, p: _where(
                y, lambda y: torch.cat([F.pad(y, (p - 1, 0), value=-100), y[:, -1:]], 1)
            )
        ),
        "the first label is left out as well: the last virtual token predicts it": _joined(
            labels=lambda y, p: _where(y, lambda y: F.pad(y[:, 1:], (p + 1, 0), value=-100))
        ),
        "the prompt is put behind the text": _joined(
            embeddings=lambda E, m, P: torch.cat([E, _put(E, P)[:, : len(P)]], 1)
        ),
        "rows with padding get a weaker prompt: each row gets it as it is": _joined(
            embeddings=lambda E, m, P: _weakened(E, m, P, shared=False)
        ),
        (
            "a write into expanded rows reaches all of them, for they are one and the same memory: "
            "that of prompt"
        ): _joined(embeddings=lambda E, m, P: _weakened(E, m, P, shared=True)),
        "the prompt is put over the first p tokens of the text: put it before them": _joined(
            mask=lambda m, p: m,
            labels=lambda y, p: y,
            embeddings=lambda E, m, P: _put(E, P)[:, : E.shape[1]],
        ),
        "mask and labels have changed places: return embeddings, mask, labels": lambda E, m, y, P: (
            _put(E, P),
            _before(y, len(P), -100),
            _before(m, len(P), 1),
        ),
        "only the first row has the prompt": _joined(
            embeddings=lambda E, m, P: torch.cat([_put(E, P)[:1], _put(E, torch.zeros_like(P))[1:]])
        ),
        "the prompt is cut off and learns nothing: detach(), .data and no_grad() do that": _joined(
            embeddings=lambda E, m, P: _put(E, P.detach())
        ),
        "the text is cut off: what stands before it may learn, and what it comes from too": _joined(
            embeddings=lambda E, m, P: _put(E.detach(), P)
        ),
    },
)
def prepend_prompt(embeddings, mask, labels, prompt):
    """The same prompt before every row, seen by all and a label of none."""
    joined, p = [], len(prompt)
    for row in embeddings:
        joined.append(torch.stack([*prompt.to(row.dtype), *row]))
    given = [None if rows is None else rows.tolist() for rows in (mask, labels)]
    pairs = zip(given, (1, -100), strict=True)
    longer = [rows and torch.tensor([[v] * p + row for row in rows]) for rows, v in pairs]
    return torch.stack(joined), *longer
