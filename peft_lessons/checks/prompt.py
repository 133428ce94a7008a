"""Checks of lesson 08."""

import math

import torch
from torch.nn import functional as F

from .kit import Case, check_for, refused
from .mistakes import mistakes


def _table(vocabulary, width, zero=None, dtype=torch.float32):
    """Return rows of very different norms, for which a dot product and a cosine differ in
    choice."""
    lengths = torch.logspace(-1, 1, vocabulary)[torch.randperm(vocabulary), None]
    table = F.normalize(torch.randn(vocabulary, width)) * lengths
    if zero is not None:
        table[zero] = 0
    return table.to(dtype)


# ------------------------------------------------------------------ nearest_tokens


def _moved(p, vocabulary, width, k, **settings):
    """Return a prompt as training leaves it: tokens of the table, shifted and stretched."""
    table = _table(vocabulary, width, **settings)
    start = F.normalize(table[torch.randperm(vocabulary)[:p]])
    stretch = torch.logspace(-1, 1, p, dtype=table.dtype)[:, None]
    return [(start + 0.2 * torch.randn_like(start)) * stretch, table, k]


@check_for(
    cases=[
        Case(lambda: _moved(3, 40, 12, 4)),
        Case(lambda: _moved(7, 30, 9, 1), note="one token per row"),
        Case(lambda: _moved(8, 8, 8, 5), note="as many virtual tokens as tokens"),
        Case(lambda: _moved(5, 25, 6, 25, zero=0), note="the row of the padding token is zero"),
        Case(lambda: _moved(4, 33, 10, 6, dtype=torch.float64)),
        Case(lambda: _moved(1, 20, 5, 3), note="a single virtual token"),
    ],
    returns="the table of ids",
    causes=mistakes(
        """
        def nearest_tokens(prompt, embeddings, k):
            P, E = F.normalize(prompt), F.normalize(embeddings)
            best = (P @ E.T).topk(k)
            return best.indices
        """,
        """
        this is a dot product, which prefers rows with a large norm: divide them by their norms
            F.normalize(prompt), F.normalize(embeddings) → prompt, embeddings
        this is the Euclidean distance, which depends on the norms of the rows: use the cosine
            (P @ E.T) → (-torch.cdist(prompt, embeddings))
        these are the least similar tokens
            topk(k) → topk(k, largest=False)
        the order is reversed: the most similar token comes first
            best.indices → best.indices.flip(1)
        the columns are normalised, not the rows: a token is a row
            F.normalize(prompt) → F.normalize(prompt, dim=0)
            F.normalize(embeddings) → F.normalize(embeddings, dim=0)
        these are the similarities: return their ids
            best.indices → best.values
        the cosine has lost its sign: the opposite of a token is not near it
            (P @ E.T) → (P @ E.T).abs()
        a row of zeros comes last: its cosine is 0, which is larger than a negative one
            (P @ E.T) → (P @ E.T).masked_fill((embeddings == 0).all(1), -torch.inf)
        a row of zeros has no direction: divided by its norm it is NaN, which topk takes for the
        largest; its cosine is 0
            F.normalize(embeddings) → embeddings / embeddings.norm(dim=1, keepdim=True)
        the result is transposed: one row per virtual token
            best.indices → best.indices.T
        one token per row is a column too: keep the shape (p, k)
            best.indices → best.indices.squeeze(1)
        """,
    ),
)
def nearest_tokens(prompt, embeddings, k):
    """The result has the k tokens with the smallest angle to each virtual token, nearest first."""
    rows = []
    for row in prompt.double():
        angles = []
        for token, vector in enumerate(embeddings.double()):
            length = math.sqrt(float(row @ row)) * math.sqrt(float(vector @ vector))
            angles.append((-float(row @ vector) / length if length else 0.0, token))
        rows.append([token for _, token in sorted(angles)[:k]])
    return torch.tensor(rows)


# ------------------------------------------------------------------ init_from_text


def _text(n, vocabulary, width, p):
    return [torch.randperm(vocabulary)[:n], torch.randn(vocabulary, width), p]


@check_for(
    cases=[
        Case(lambda: _text(4, 30, 6, 11), note="the text is repeated, the last time cut off"),
        Case(lambda: _text(9, 30, 6, 4), note="the text is cut off"),
        Case(lambda: _text(5, 20, 5, 5), note="the text has p tokens"),
        Case(lambda: _text(3, 20, 7, 9), note="the text fits three times"),
        Case(lambda: _text(1, 20, 7, 3), note="a text of one token"),
    ],
    returns="the prompt",
    causes=mistakes(
        """
        def init_from_text(ids, embeddings, p):
            times = math.ceil(p / len(ids))
            chosen = ids.repeat(times)[:p]
            return embeddings[chosen]
        """,
        """
        each token is repeated by itself: repeat the text as a whole, a b c a b c
            ids.repeat(times) → ids.repeat_interleave(times)
        the rows after the end of the text are zero: repeat the text
            embeddings[chosen] → F.pad(embeddings[ids], (0, 0, 0, max(0, p - len(ids))))[:p]
        the last token is repeated: repeat the text from its beginning
            ids.repeat(times)[:p] → ids[torch.arange(p).clamp(max=len(ids) - 1)]
        a long text keeps its last p tokens: PEFT keeps the first p
            ids.repeat(times) → ids[-p:].repeat(times)
        the text begins with its second token: row 0 is the first token
            ids.repeat(times)[:p] → ids[(torch.arange(p) + 1) % len(ids)]
        the first token is repeated to the end: repeat the whole text
            ids.repeat(times)[:p] → torch.cat([ids, ids[:1].expand(p)])[:p]
        the repeated text loses its beginning: cut off its end
            [:p] → [-p:]
        the text is repeated but not cut to p tokens
            [:p] → ∅
        the text is repeated too few times: round the number of repetitions up
            math.ceil(p / len(ids)) → max(1, p // len(ids))
        a short text is not repeated: the prompt has p rows
            .repeat(times) → ∅
        these are the ids: return their embeddings
            embeddings[chosen] → chosen
        """,
    ),
)
def init_from_text(ids, embeddings, p):
    """The start is the text's embeddings, repeated or cut off as PEFT does."""
    rows = []
    while len(rows) < p:
        for token in ids.tolist():
            rows.append(embeddings[token])
    return torch.stack(rows[:p])


# ------------------------------------------------------------------ prompt_ensemble


def _prompts(weights, p, width):
    scales = torch.logspace(-0.5, 0.5, len(weights))
    return [[s * torch.randn(p, width) for s in scales], weights]


@check_for(
    cases=[
        Case(lambda: _prompts([0.3, 0.7], 4, 6)),
        Case(lambda: _prompts([1.0, 2.0, 5.0], 5, 3), note="weights that do not sum to 1"),
        Case(lambda: _prompts([2, 0, 1, 4], 4, 4), note="one weight is 0"),
        Case(lambda: _prompts([3.0], 2, 7), note="a single prompt"),
        Case(lambda: _prompts([2.0, -0.5, 1.0], 3, 5), note="one weight is negative"),
        refused(lambda: [_prompts([1, 1], 3, 4)[0], [1.0]], "", "one weight for two prompts"),
        refused(lambda: [_prompts([1], 3, 4)[0], [1.0, 2.0]], "", "two weights for one prompt"),
    ],
    returns="the prompt",
    gradients=("prompts",),
    causes=mistakes(
        """
        def prompt_ensemble(prompts, weights):
            if len(prompts) != len(weights):
                raise ValueError("give one weight for each prompt")
            shares = torch.tensor(weights) / sum(weights)
            return (shares[:, None, None] * torch.stack(prompts)).sum(0)
        """,
        """
        the weights are not divided by their sum: a mean of equal prompts must be that prompt
            / sum(weights) → ∅
        the weighted sum is divided by the number of prompts: divide by the sum of weights
            / sum(weights) → / len(weights)
        the weights are not used: this is the plain mean
            (shares[:, None, None] * torch.stack(prompts)).sum(0) → torch.stack(prompts).mean(0)
        the weights lose their sign: a single one may be negative, if the sum is positive
            torch.tensor(weights) / sum(weights) →
                torch.tensor(weights).abs() / sum(map(abs, weights))
        the weights go through a softmax: 1 and 2 must count as one third and two thirds
            torch.tensor(weights) / sum(weights) → torch.tensor(weights).float().softmax(0)
        the prompts are put one after the other: the mean has p rows
            .sum(0) → .flatten(0, 1)
        the prompts are stacked, not summed
            .sum(0) → ∅
        """,
    ),
)
def prompt_ensemble(prompts, weights):
    """The weighted mean of prompts, row by row."""
    if len(prompts) != len(weights):
        raise ValueError("weights")
    total = math.fsum(weights)
    shares = torch.tensor([w / total for w in weights], dtype=prompts[0].dtype)
    return torch.einsum("k,kpd->pd", shares, torch.stack(prompts))


# ------------------------------------------------------------------ prepend_prompt


def _batch(batch, length, width, p, left=True, mask=True, labels=True):
    """Return a padded batch whose labels are not a copy of anything else."""
    kept = torch.ones(batch, length)  # floats, so that ones of any dtype fit before them
    for row in range(batch):
        kept[row, : row % length] = 0
    kept = kept if left else kept.flip(1)
    ids = torch.randint(3, 99, (batch, length)).masked_fill(kept == 0, -100)
    embeddings = torch.randn(batch, length, width)
    prompt = 2 * torch.randn(p, width)
    return [embeddings, kept if mask else None, ids if labels else None, prompt]


# The embeddings first: they tell where the prompt is.
_PARTS = ("the embeddings", "the mask", "the labels")


def _seen(result):
    return dict(zip(_PARTS, result, strict=True))


def _between(embeddings, mask, labels, prompt):
    """Put the prompt after the padding on the left."""
    found, p = [], len(prompt)
    for i, row in enumerate(embeddings):
        at = 0 if mask is None else int(mask[i].argmax())
        inserted = [(row, prompt.to(row.dtype))]
        inserted += [
            (t[i], t.new_full((p,), v)) for t, v in ((mask, 1), (labels, -100)) if t is not None
        ]
        found.append([torch.cat([t[:at], new, t[at:]]) for t, new in inserted])
    joined, *longer = map(torch.stack, zip(*found, strict=True))
    return joined, *(None if t is None else longer.pop(0) for t in (mask, labels))


@check_for(
    cases=[
        Case(lambda: _batch(3, 5, 4, 2), note="padded on the left"),
        Case(lambda: _batch(4, 3, 6, 5, left=False), note="padded on the right"),
        Case(lambda: _batch(1, 6, 6, 6), note="a single text"),
        Case(lambda: _batch(3, 4, 3, 1, mask=False), note="no mask"),
        Case(lambda: _batch(2, 4, 5, 3, labels=False), note="no labels"),
    ],
    returns=("embeddings", "mask", "labels"),
    view=_seen,
    staged=True,
    gradients=("embeddings", "prompt"),
    causes=mistakes(
        """
        def prepend_prompt(embeddings, mask, labels, prompt):
            n, p = len(embeddings), len(prompt)
            rows = prompt.to(embeddings.dtype).repeat(n, 1, 1)
            if mask is not None:
                mask = F.pad(mask, (p, 0), value=1)
            if labels is not None:
                labels = F.pad(labels, (p, 0), value=-100)
            return torch.cat([rows, embeddings], 1), mask, labels
        """,
        """
        the mask is not extended: p ones belong before each of its rows
            mask = F.pad(mask, (p, 0), value=1) → pass
        the mask's ones are put after the text: the prompt comes before the text
            F.pad(mask, (p, 0) → F.pad(mask, (0, p)
        the mask hides the prompt: the prompt's positions get ones
            value=1) → value=0)
        the mask is all ones: now the padding of the text is seen
            F.pad(mask, (p, 0), value=1) → F.pad(mask, (p, 0)).fill_(1)
        the prompt's labels are put after the text: the p values of -100 come first
            F.pad(labels, (p, 0) → F.pad(labels, (0, p)
        the labels are shifted by hand, so that each position holds the next token: a Hugging Face
        model shifts labels itself, and these would be shifted twice
            F.pad(labels, (p, 0) → F.pad(labels[:, 1:], (p, 1)
        the labels are shifted by hand, so that the last virtual token holds the first token of the
        text: a Hugging Face model shifts labels itself, and these would be shifted twice
            F.pad(labels, (p, 0) → F.pad(labels, (p - 1, 1)
        the labels are rolled by hand, so that the first token becomes the label of the last
        position: a Hugging Face model shifts labels itself
            F.pad(labels, (p, 0) → F.pad(labels.roll(-1, 1), (p, 0)
        the labels are shifted to the right by one position, and the last one is lost: each label
        belongs to the position of its own token
            F.pad(labels, (p, 0) → F.pad(labels[:, :-1], (p + 1, 0)
        the prompt's labels are 0, a token of the vocabulary: -100 leaves them out
            value=-100 → value=0
        the first label of the text is -100 too: only the p virtual tokens have none
            F.pad(labels, (p, 0) → F.pad(labels[:, 1:], (p + 1, 0)
        the order is reversed: the mask comes before the labels
            1), mask, labels → 1), labels, mask
        the prompt is put between the padding and the text: it comes before both
            = between
        the prompt is put after the text
            [rows, embeddings] → [embeddings, rows]
        texts with padding get a weaker prompt: each text gets the prompt as it is
            mask = F → rows = rows * mask.to(rows).mean(1)[:, None, None]; mask = F
        expanded rows all share the memory of prompt, so a write into one row changes every row
            .repeat(n, 1, 1) → .expand(n, -1, -1)
            mask = F → [r.detach().mul_(m.float().mean()) for r, m in zip(rows, mask)]; mask = F
        no gradient reaches the prompt, so it learns nothing: detach(), .data and no_grad() cut it
        off
            prompt.to( → prompt.detach().to(
        """,
        between=_between,
    ),
)
def prepend_prompt(embeddings, mask, labels, prompt):
    """Every text comes after the prompt and sees all of it, and no label is a virtual token."""
    joined, p = [], len(prompt)
    for row in embeddings:
        joined.append(torch.stack([*prompt.to(row.dtype), *row]))
    given = [None if rows is None else rows.tolist() for rows in (mask, labels)]
    pairs = zip(given, (1, -100), strict=True)
    longer = [rows and torch.tensor([[v] * p + row for row in rows]) for rows, v in pairs]
    return torch.stack(joined), *longer
