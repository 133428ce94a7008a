"""Answers to the exercises of lesson 08."""

import itertools
import math

import torch
import torch.nn.functional as F

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ nearest_tokens


def cosines(prompt, embeddings):
    return F.cosine_similarity(prompt[:, None], embeddings[None], dim=-1)


@wrong("nearest_tokens", "this is a dot product, which prefers long rows")
def dot_product(prompt, embeddings, k):
    return (prompt @ embeddings.T).topk(k).indices


@wrong("nearest_tokens", "this is a dot product, which prefers long rows")
def only_the_prompt_normalised(prompt, embeddings, k):
    unit = prompt / prompt.norm(dim=1, keepdim=True)
    return torch.topk(unit @ embeddings.T, k, dim=-1)[1]


@wrong("nearest_tokens", "this is the Euclidean distance")
def euclidean(prompt, embeddings, k):
    return torch.cdist(prompt, embeddings).topk(k, largest=False).indices


@wrong("nearest_tokens", "these are the least similar tokens")
def largest_cosine_taken_for_a_distance(prompt, embeddings, k):
    return cosines(prompt, embeddings).topk(k, largest=False).indices


@wrong("nearest_tokens", "these are the least similar tokens")
def argsort_ascending(prompt, embeddings, k):
    return cosines(prompt, embeddings).argsort(dim=1)[:, :k]


@wrong("nearest_tokens", "the order is turned")
def the_last_of_argsort(prompt, embeddings, k):
    return cosines(prompt, embeddings).argsort(dim=1)[:, -k:]


@wrong("nearest_tokens", "the ids are sorted")
def sorted_ids(prompt, embeddings, k):
    return cosines(prompt, embeddings).topk(k).indices.sort().values


@wrong("nearest_tokens", "the columns are normalised, not the rows")
def columns_normalised(prompt, embeddings, k):
    return (F.normalize(prompt, dim=0) @ F.normalize(embeddings, dim=0).T).topk(k).indices


@wrong("nearest_tokens", "these are the similarities: return their ids")
def similarities(prompt, embeddings, k):
    return cosines(prompt, embeddings).topk(k).values


@wrong("nearest_tokens", "is a tuple of 2, expected a tensor")
def both_of_topk(prompt, embeddings, k):
    return tuple(cosines(prompt, embeddings).topk(k))


@wrong("nearest_tokens", "the cosine has lost its sign")
def absolute(prompt, embeddings, k):
    return cosines(prompt, embeddings).abs().topk(k).indices


@wrong("nearest_tokens", "a row of zeros has no direction")
def divided_by_zero(prompt, embeddings, k):
    lengths = prompt.norm(dim=1)[:, None] * embeddings.norm(dim=1)[None]
    return (prompt @ embeddings.T / lengths).topk(k).indices


@wrong("nearest_tokens", "every row gets the tokens nearest to the mean")
def of_the_mean(prompt, embeddings, k):
    one = F.cosine_similarity(prompt.mean(0)[None], embeddings).topk(k).indices
    return one.repeat(len(prompt), 1)


@wrong("nearest_tokens", "the result is transposed")
def transposed(prompt, embeddings, k):
    return cosines(embeddings, prompt).topk(k, dim=0).indices


@wrong("nearest_tokens", "keep the shape (p, k)")
def squeezed(prompt, embeddings, k):
    return cosines(prompt, embeddings).topk(k).indices.squeeze(-1)


@wrong("nearest_tokens", "has shape (3,), expected (3, 4)")
def only_one(prompt, embeddings, k):
    return cosines(prompt, embeddings).argmax(dim=1)


@wrong("nearest_tokens", "is a list of 3, expected a tensor")
def a_list(prompt, embeddings, k):
    return cosines(prompt, embeddings).topk(k).indices.tolist()


@wrong("nearest_tokens", "your function raised")
def of_the_vocabulary(prompt, embeddings, k):
    return (prompt @ embeddings).topk(k).indices


@wrong("nearest_tokens", "the argument embeddings was changed")
def in_place(prompt, embeddings, k):
    embeddings.div_(embeddings.norm(dim=1, keepdim=True).clamp(min=1e-9))
    return (prompt @ embeddings.T).topk(k).indices


@right("nearest_tokens")
def by_argsort(prompt, embeddings, k):
    return cosines(prompt, embeddings).argsort(dim=1, descending=True)[:, :k]


@right("nearest_tokens")
def by_distance_of_directions(prompt, embeddings, k):
    """‖u − v‖² = 2 − 2 cos: the same order, where there is a direction."""
    cosine = 1 - torch.cdist(F.normalize(prompt), F.normalize(embeddings)).square() / 2
    cosine[:, embeddings.norm(dim=1) == 0] = 0
    return cosine.sort(dim=1, descending=True).indices[:, :k]


@right("nearest_tokens")
def row_by_row(prompt, embeddings, k):
    rows = [F.cosine_similarity(row[None], embeddings, dim=1) for row in prompt]
    return torch.stack([torch.topk(row, k).indices for row in rows])


@right("nearest_tokens")
def only_the_tokens_normalised(prompt, embeddings, k):
    """The length of a row of the prompt doesn't change its order."""
    lengths = embeddings.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return torch.einsum("pd,vd->pv", prompt, embeddings / lengths).topk(k, dim=1).indices


# ------------------------------------------------------------------ init_from_text


def refuse(ids):
    if len(ids) == 0:
        raise ValueError("ids is empty")


@wrong("init_from_text", "each token is repeated by itself")
def interleaved(ids, embeddings, p):
    times = -(-p // len(ids))
    return embeddings[ids].repeat_interleave(times, dim=0)[:p]


@wrong("init_from_text", "what the text leaves empty is zero")
def zeros(ids, embeddings, p):
    rows = embeddings.new_zeros(p, embeddings.shape[1])
    n = min(p, len(ids))
    rows[:n] = embeddings[ids[:n]]
    return rows


@wrong("init_from_text", "the last token is repeated")
def last_repeated(ids, embeddings, p):
    return embeddings[[int(ids[min(i, len(ids) - 1)]) for i in range(p)]]


@wrong("init_from_text", "the first token is repeated")
def first_repeated(ids, embeddings, p):
    more = ids[0].repeat(max(0, p - len(ids)))
    return embeddings[torch.cat([ids, more])[:p]]


@wrong("init_from_text", "a long text keeps its last p tokens")
def end_kept(ids, embeddings, p):
    ids = ids[-p:]
    return embeddings[ids.repeat(math.ceil(p / len(ids)))[:p]]


@wrong("init_from_text", "the repeated text loses its beginning")
def beginning_lost(ids, embeddings, p):
    return embeddings[ids].repeat(math.ceil(p / len(ids)), 1)[-p:]


@wrong("init_from_text", "the text is repeated but not cut off to p")
def not_cut(ids, embeddings, p):
    return embeddings[ids].repeat(math.ceil(p / len(ids)), 1)


@wrong("init_from_text", "the text is repeated too rarely")
def rounded_down(ids, embeddings, p):
    ids = ids.repeat(p // len(ids)) if len(ids) < p else ids
    return embeddings[ids[:p]]


@wrong("init_from_text", "a short text is not repeated")
def cut_only(ids, embeddings, p):
    return embeddings[ids][:p]


@wrong("init_from_text", "every row is the mean of the text")
def mean(ids, embeddings, p):
    return embeddings[ids].mean(dim=0, keepdim=True).expand(p, -1).clone()


@wrong("init_from_text", "the text is stretched over p rows")
def stretched(ids, embeddings, p):
    return embeddings[[int(ids[i * len(ids) // p]) for i in range(p)]]


@wrong("init_from_text", "the second repetition runs backwards")
def mirrored(ids, embeddings, p):
    roundtrip_error = [*ids.tolist(), *ids.tolist()[::-1]]
    return embeddings[list(itertools.islice(itertools.cycle(roundtrip_error), p))]


@wrong("init_from_text", "the text begins with its second token")
def off_by_one(ids, embeddings, p):
    return torch.stack([embeddings[ids[i % len(ids)]] for i in range(1, p + 1)])


@wrong("init_from_text", "these are the ids: return their embeddings")
def ids_only(ids, embeddings, p):
    return ids.repeat(math.ceil(p / len(ids)))[:p]


@wrong("init_from_text", "these are the first rows of the table")
def rows_of_the_table(ids, embeddings, p):
    return torch.stack([embeddings[i % len(ids)] for i in range(p)])


@wrong("init_from_text", "nothing was raised, where ValueError was due")
def empty_is_zero(ids, embeddings, p):
    if len(ids) == 0:
        return embeddings.new_zeros(p, embeddings.shape[1])
    return embeddings[ids[torch.arange(p) % len(ids)]]


@wrong("init_from_text", "where ValueError was due")
def empty_divides(ids, embeddings, p):
    return embeddings[ids.repeat(math.ceil(p / len(ids)))[:p]]


@wrong("init_from_text", "the prompt has dtype float32, expected float64")
def always_float32(ids, embeddings, p):
    return embeddings[ids.repeat(math.ceil(p / len(ids)))[:p]].float()


@right("init_from_text")
def by_repeat(ids, embeddings, p):
    refuse(ids)
    return embeddings[ids.repeat(math.ceil(p / len(ids)))[:p]]


@right("init_from_text")
def by_cycle(ids, embeddings, p):
    refuse(ids)
    return torch.stack([embeddings[i] for i in itertools.islice(itertools.cycle(ids.tolist()), p)])


@right("init_from_text")
def by_embedding(ids, embeddings, p):
    if ids.numel() < 1:
        raise ValueError("ids: no token")
    while len(ids) < p:
        ids = torch.cat([ids, ids])
    return F.embedding(ids[:p], embeddings)


@right("init_from_text")
def by_one_hot(ids, embeddings, p):
    refuse(ids)
    chosen = F.one_hot(ids, len(embeddings)).to(embeddings.dtype)
    return (chosen @ embeddings).tile(p, 1)[:p].clone()


# ------------------------------------------------------------------ prompt_ensemble


def agreed(prompts, weights):
    if len(prompts) != len(weights):
        raise ValueError(f"{len(weights)} weights for {len(prompts)} prompts")
    if any(w < 0 for w in weights) or sum(weights) <= 0:
        raise ValueError("weights must be 0 or more, and not all 0")
    if any(prompt.shape != prompts[0].shape for prompt in prompts):
        raise ValueError("prompts have different shapes")


@wrong("prompt_ensemble", "the weights are not divided by their sum")
def weighted_sum(prompts, weights):
    return sum(w * p for w, p in zip(weights, prompts, strict=True))


@wrong("prompt_ensemble", "divided by the number of prompts")
def divided_by_the_number(prompts, weights):
    return sum(w * p for w, p in zip(weights, prompts, strict=True)) / len(prompts)


@wrong("prompt_ensemble", "the weights are not used")
def plain_mean(prompts, weights):
    return torch.stack(prompts).mean(dim=0)


@wrong("prompt_ensemble", "the weights go through a softmax")
def softmax(prompts, weights):
    shares = torch.tensor(weights, dtype=prompts[0].dtype).softmax(0)
    return torch.tensordot(shares, torch.stack(prompts), dims=1)


@wrong("prompt_ensemble", "the weights are squared")
def squared(prompts, weights):
    squares = [w * w for w in weights]
    return sum(w * p for w, p in zip(squares, prompts, strict=True)) / sum(squares)


@wrong("prompt_ensemble", "normalised by their Euclidean length")
def unit_weights(prompts, weights):
    length = math.sqrt(sum(w * w for w in weights))
    return sum(w / length * p for w, p in zip(weights, prompts, strict=True))


@wrong("prompt_ensemble", "each prompt is divided by its norm")
def unit_prompts(prompts, weights):
    return sum(w * p / p.norm() for w, p in zip(weights, prompts, strict=True)) / sum(weights)


@wrong("prompt_ensemble", "each row is divided by its length")
def unit_rows(prompts, weights):
    rows = [F.normalize(p, dim=-1) for p in prompts]
    return sum(w * p for w, p in zip(weights, rows, strict=True)) / sum(weights)


@wrong("prompt_ensemble", "the weights are turned")
def turned(prompts, weights):
    return sum(w * p for w, p in zip(weights[::-1], prompts, strict=True)) / sum(weights)


@wrong("prompt_ensemble", "only the prompt of the largest weight is used")
def the_best(prompts, weights):
    return prompts[max(range(len(weights)), key=weights.__getitem__)].clone()


@wrong("prompt_ensemble", "the prompts are put one after the other")
def concatenated(prompts, weights):
    total = sum(weights)
    return torch.cat([w / total * p for w, p in zip(weights, prompts, strict=True)])


@wrong("prompt_ensemble", "the prompts are stacked, not summed")
def stacked(prompts, weights):
    total = sum(weights)
    return torch.stack([w / total * p for w, p in zip(weights, prompts, strict=True)])


@wrong("prompt_ensemble", "the rows are averaged too")
def one_row(prompts, weights):
    rows = [p.mean(dim=0) for p in prompts]
    return sum(w * p for w, p in zip(weights, rows, strict=True)) / sum(weights)


@wrong("prompt_ensemble", "no gradient reaches prompts")
def detached(prompts, weights):
    agreed(prompts, weights)
    return sum(w * p.data for w, p in zip(weights, prompts, strict=True)) / sum(weights)


@wrong("prompt_ensemble", "nothing was raised, where ValueError was due")
def zip_stops(prompts, weights):
    return sum(w * p for w, p in zip(weights, prompts, strict=False)) / sum(weights)


@wrong("prompt_ensemble", "the message does not name 'weights'")
def divided_by_zero_weights(prompts, weights):
    return sum(w * p for w, p in zip(weights, prompts, strict=True)) / sum(weights)


@wrong("prompt_ensemble", "nothing was raised, where ValueError was due")
def broadcast(prompts, weights):
    agreed([p.expand(3, -1) if len(p) == 1 else p for p in prompts], weights)
    return sum(w * p for w, p in zip(weights, prompts, strict=True)) / sum(weights)


@wrong("prompt_ensemble", "the argument prompts was changed")
def in_the_first(prompts, weights):
    agreed(prompts, weights)
    with torch.no_grad():
        total = prompts[0].mul_(weights[0])
    for w, p in zip(weights[1:], prompts[1:], strict=True):
        total = total + w * p
    return total / sum(weights)


@right("prompt_ensemble")
def by_einsum(prompts, weights):
    agreed(prompts, weights)
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return torch.einsum("k,kpd->pd", shares.to(prompts[0].dtype), torch.stack(list(prompts)))


@right("prompt_ensemble")
def by_matmul(prompts, weights):
    agreed(prompts, weights)
    flat = torch.stack([p.flatten() for p in prompts])
    row = torch.as_tensor(weights, dtype=flat.dtype)[None]
    return (row @ flat / row.sum()).view_as(prompts[0])


@right("prompt_ensemble")
def by_loop(prompts, weights):
    agreed(prompts, weights)
    total = torch.zeros_like(prompts[0])
    for prompt, weight in zip(prompts, weights, strict=True):
        total = total + prompt * (weight / sum(weights))
    return total


# ------------------------------------------------------------------ prepend_prompt

NO_MASK = "the mask is not lengthened"
SHIFTED = "the labels are shifted against the text"
SHARED = "a write into expanded rows reaches all of them"


def hunted(write=True, mask_fixed=False, labels_fixed=False):
    """The stub, with some of its faults mended."""

    def prepend_prompt(embeddings, mask, labels, prompt):
        batch, p = len(embeddings), len(prompt)
        rows = prompt.to(embeddings.dtype).expand(batch, -1, -1)
        if write and mask is not None:
            with torch.no_grad():
                for row, kept in zip(rows, mask, strict=True):
                    row.mul_(kept.float().mean())
        if mask_fixed and mask is not None:
            mask = torch.cat([mask.new_ones(batch, p), mask], dim=1)
        if labels is not None:
            ignored = labels.new_full((batch, p), -100)
            parts = [ignored, labels] if labels_fixed else [labels, ignored]
            labels = torch.cat(parts, dim=1)
        return torch.cat([rows, embeddings], dim=1), mask, labels

    return prepend_prompt


wrong("prepend_prompt", NO_MASK)(hunted())  # the stub as it is given
wrong("prepend_prompt", NO_MASK)(hunted(labels_fixed=True))
wrong("prepend_prompt", NO_MASK)(hunted(write=False, labels_fixed=True))
wrong("prepend_prompt", SHIFTED)(hunted(mask_fixed=True))
wrong("prepend_prompt", SHIFTED)(hunted(write=False, mask_fixed=True))
wrong("prepend_prompt", SHARED)(hunted(mask_fixed=True, labels_fixed=True))
right("prepend_prompt")(hunted(write=False, mask_fixed=True, labels_fixed=True))


def pieces(embeddings, mask, labels, prompt):
    """The three results, all right."""
    batch, p = embeddings.shape[0], prompt.shape[0]
    rows = prompt[None].to(embeddings.dtype).repeat(batch, 1, 1)
    mask = None if mask is None else F.pad(mask, (p, 0), value=1)
    labels = None if labels is None else F.pad(labels, (p, 0), value=-100)
    return torch.cat((rows, embeddings), 1), mask, labels


@wrong("prepend_prompt", "rows with padding get a weaker prompt")
def weakened_copies(embeddings, mask, labels, prompt):
    """expand became repeat, so that each row is its own; but who asked for it to be weakened?"""
    rows = prompt.to(embeddings.dtype).repeat(len(embeddings), 1, 1)
    if mask is not None:
        for row, kept in zip(rows, mask, strict=True):
            row.mul_(kept.float().mean())
    _, longer, labels = pieces(embeddings, mask, labels, prompt)
    return torch.cat([rows, embeddings], 1), longer, labels


@wrong("prepend_prompt", "the mask's ones are put behind the text")
def mask_behind(embeddings, mask, labels, prompt):
    joined, longer, labels = pieces(embeddings, mask, labels, prompt)
    if mask is not None:
        longer = torch.cat([mask, torch.ones_like(mask[:, :1]).repeat(1, len(prompt))], 1)
    return joined, longer, labels


@wrong("prepend_prompt", "the mask hides the prompt")
def mask_of_zeros(embeddings, mask, labels, prompt):
    joined, _, labels = pieces(embeddings, mask, labels, prompt)
    return joined, None if mask is None else F.pad(mask, (len(prompt), 0)), labels


@wrong("prepend_prompt", "the mask is all ones")
def mask_of_ones(embeddings, mask, labels, prompt):
    joined, longer, labels = pieces(embeddings, mask, labels, prompt)
    return joined, None if mask is None else torch.ones_like(longer), labels


@wrong("prepend_prompt", "a padded row hides its prompt")
def mask_continued(embeddings, mask, labels, prompt):
    joined, longer, labels = pieces(embeddings, mask, labels, prompt)
    if mask is not None:
        longer = torch.cat([mask[:, :1].expand(-1, len(prompt)), mask], dim=1)
    return joined, longer, labels


@wrong("prepend_prompt", "mask has dtype float32, expected int64")
def mask_of_floats(embeddings, mask, labels, prompt):
    """As in PEFT, which gets away with it."""
    joined, longer, labels = pieces(embeddings, mask, labels, prompt)
    if mask is not None:
        longer = torch.cat([torch.ones(len(mask), len(prompt)), mask], dim=1)
    return joined, longer, labels


@wrong("prepend_prompt", "the labels are not lengthened")
def labels_as_they_are(embeddings, mask, labels, prompt):
    return (*pieces(embeddings, mask, None, prompt)[:2], labels)


@wrong("prepend_prompt", "the prompt's labels are 0")
def labels_of_zero(embeddings, mask, labels, prompt):
    joined, mask, _ = pieces(embeddings, mask, labels, prompt)
    return joined, mask, None if labels is None else F.pad(labels, (len(prompt), 0))


@wrong("prepend_prompt", "the prompt's labels are -1")
def labels_of_minus_one(embeddings, mask, labels, prompt):
    joined, mask, _ = pieces(embeddings, mask, labels, prompt)
    return joined, mask, None if labels is None else F.pad(labels, (len(prompt), 0), value=-1)


@wrong("prepend_prompt", "the labels of the last virtual token are the text's first")
def labels_shifted_by_one(embeddings, mask, labels, prompt):
    joined, mask, longer = pieces(embeddings, mask, labels, prompt)
    if labels is not None:
        longer = torch.cat([longer[:, 1:], labels[:, -1:]], dim=1)
    return joined, mask, longer


@wrong("prepend_prompt", "the first label is left out as well")
def first_label_left_out(embeddings, mask, labels, prompt):
    joined, mask, longer = pieces(embeddings, mask, labels, prompt)
    if labels is not None:
        longer[:, len(prompt)] = -100
    return joined, mask, longer


@wrong("prepend_prompt", "the prompt is put behind the text")
def behind(embeddings, mask, labels, prompt):
    _, mask, labels = pieces(embeddings, mask, labels, prompt)
    rows = prompt.to(embeddings.dtype).expand(len(embeddings), -1, -1)
    return torch.cat([embeddings, rows], 1), mask, labels


@wrong("prepend_prompt", "the prompt is cut off and learns nothing")
def prompt_detached(embeddings, mask, labels, prompt):
    return pieces(embeddings, mask, labels, prompt.data)


@wrong("prepend_prompt", "no gradient reaches")
def nothing_learns(embeddings, mask, labels, prompt):
    with torch.no_grad():
        return pieces(embeddings, mask, labels, prompt)


@wrong("prepend_prompt", "the text is cut off")
def text_detached(embeddings, mask, labels, prompt):
    return pieces(embeddings.detach(), mask, labels, prompt)


@wrong("prepend_prompt", "only the first row has the prompt")
def first_row_only(embeddings, mask, labels, prompt):
    joined, mask, labels = pieces(embeddings, mask, labels, prompt)
    keep = torch.ones_like(joined)
    keep[1:, : len(prompt)] = 0
    return joined * keep, mask, labels


@wrong("prepend_prompt", "embeddings has dtype float32, expected float64")
def prompts_dtype(embeddings, mask, labels, prompt):
    return pieces(embeddings.to(prompt.dtype), mask, labels, prompt)


@wrong("prepend_prompt", "your function raised AttributeError: 'NoneType'")
def mask_required(embeddings, mask, labels, prompt):
    batch, p = len(embeddings), len(prompt)
    mask = torch.cat([mask.new_ones(batch, p), mask], 1)
    joined, _, labels = pieces(embeddings, None, labels, prompt)
    return joined, mask, labels


@wrong("prepend_prompt", "mask and labels have changed places")
def other_order(embeddings, mask, labels, prompt):
    joined, mask, labels = pieces(embeddings, mask, labels, prompt)
    return joined, labels, mask


right("prepend_prompt")(pieces)


@right("prepend_prompt")
def filled(embeddings, mask, labels, prompt):
    batch, length, width = embeddings.shape
    p = len(prompt)
    joined = embeddings.new_empty(batch, p + length, width)
    joined[:, :p], joined[:, p:] = prompt, embeddings
    if mask is not None:
        longer = mask.new_ones(batch, p + length)
        longer[:, p:] = mask
        mask = longer
    if labels is not None:
        longer = torch.full((batch, p + length), -100)
        longer[:, p:] = labels
        labels = longer
    return joined, mask, labels


@right("prepend_prompt")
def row_by_row_joined(embeddings, mask, labels, prompt):
    rows = [torch.vstack([prompt.to(row.dtype), row]) for row in embeddings]
    if mask is not None:
        ones = torch.ones(len(prompt), dtype=mask.dtype)
        mask = torch.stack([torch.hstack([ones, row]) for row in mask])
    if labels is not None:
        ignored = torch.tensor([-100] * len(prompt))
        labels = torch.stack([torch.hstack([ignored, row]) for row in labels])
    return torch.stack(rows), mask, labels
