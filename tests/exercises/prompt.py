"""Answers to the exercises of lesson 08."""

import itertools

import torch
import torch.nn.functional as F

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ nearest_tokens


def cosines(prompt, embeddings):
    return F.cosine_similarity(prompt[:, None], embeddings[None], dim=-1)


@wrong("nearest_tokens", "is a tuple of 2, expected a tensor")
def both_of_topk(prompt, embeddings, k):
    return tuple(cosines(prompt, embeddings).topk(k))


@wrong("nearest_tokens", "has shape (3,), expected (3, 4)")
def only_one(prompt, embeddings, k):
    return cosines(prompt, embeddings).argmax(dim=1)


@right("nearest_tokens")
def by_argsort(prompt, embeddings, k):
    return cosines(prompt, embeddings).argsort(dim=1, descending=True)[:, :k]


@right("nearest_tokens")
def by_distance_of_directions(prompt, embeddings, k):
    """‖u − v‖² = 2 − 2 cos: the same order, where there is a direction."""
    cosine = 1 - torch.cdist(F.normalize(prompt), F.normalize(embeddings)).square() / 2
    cosine[:, embeddings.norm(dim=1) == 0] = 0
    return cosine.sort(dim=1, descending=True).indices[:, :k]


# ------------------------------------------------------------------ init_from_text


@right("init_from_text")
def by_cycle(ids, embeddings, p):
    return torch.stack([embeddings[i] for i in itertools.islice(itertools.cycle(ids.tolist()), p)])


@right("init_from_text")
def by_embedding(ids, embeddings, p):
    while len(ids) < p:
        ids = torch.cat([ids, ids])
    return F.embedding(ids[:p], embeddings)


# ------------------------------------------------------------------ best_swaps


def changes(gradient, embeddings, tokens):
    return torch.einsum("pd,pvd->pv", gradient, embeddings[None] - embeddings[tokens][:, None])


@right("best_swaps")
def as_pairs(gradient, embeddings, tokens, k):
    """A list of pairs, sorted."""
    table = changes(gradient, embeddings, tokens)
    pairs = itertools.product(range(len(tokens)), range(len(embeddings)))
    swaps = [(i, v) for i, v in pairs if v != tokens[i]]
    return sorted(swaps, key=lambda swap: table[swap])[:k]


@right("best_swaps")
def by_unravelling(gradient, embeddings, tokens, k):
    gain = -changes(gradient, embeddings, tokens)
    gain[F.one_hot(tokens, len(embeddings)).bool()] = float("-inf")
    best = gain.ravel().argsort(descending=True)[:k]
    return torch.stack(torch.unravel_index(best, gain.shape), dim=1)


@wrong("best_swaps", "the positions are one row and the tokens another")
def both_apart(gradient, embeddings, tokens, k):
    swaps = by_unravelling(gradient, embeddings, tokens, k)
    return swaps[:, 0], swaps[:, 1]


@wrong("best_swaps", "wrong values")
def the_position_first(gradient, embeddings, tokens, k):
    """The position with the largest gradient, and the best tokens there."""
    position = gradient.norm(dim=1).argmax()
    gain = -changes(gradient, embeddings, tokens)[position]
    gain[tokens[position]] = float("-inf")
    best = gain.topk(min(k, len(gain))).indices
    best = best.repeat(k)[:k]
    return torch.stack([position.expand(k), best], dim=1)


# ------------------------------------------------------------------ visible


@right("visible")
def with_random_tokens(predict, ids, at, vocabulary):
    """A new token drawn until it differs, and a list of truth values."""
    seen = []
    for j, token in enumerate(ids.tolist()):
        while (new := int(torch.randint(vocabulary, ()))) == token:
            pass
        other = torch.cat([ids[:j], torch.tensor([new]), ids[j + 1 :]])
        seen.append(not torch.allclose(predict(other)[at], predict(ids)[at], atol=1e-4))
    return seen


@right("visible")
def by_every_other_token(predict, ids, at, vocabulary):
    seen = torch.zeros(len(ids), dtype=torch.bool)
    for j in range(len(ids)):
        for shift in range(1, vocabulary):
            other = ids.clone()
            other[j] = (other[j] + shift) % vocabulary
            off = (predict(other) - predict(ids))[at].norm() / predict(ids)[at].norm()
            seen[j] |= off > 1e-4
    return seen


@wrong("visible", "IndexError")
def beyond_the_vocabulary(predict, ids, at, vocabulary):
    seen = []
    for j in range(len(ids)):
        other = ids.clone()
        other[j] += 1
        seen.append(not torch.allclose(predict(other)[at], predict(ids)[at], atol=1e-4))
    return torch.tensor(seen)


@wrong("visible", "predict takes the ids of one text")
def as_a_batch(predict, ids, at, vocabulary):
    others = (ids + torch.eye(len(ids), dtype=torch.long)) % vocabulary
    return (predict(others)[:, at] - predict(ids[None])[:, at]).abs().amax(1) > 1e-4


@wrong("visible", "the argument ids was changed")
def in_place(predict, ids, at, vocabulary):
    before, seen = predict(ids)[at], []
    for j in range(len(ids)):
        ids[j] = (ids[j] + 1) % vocabulary
        seen.append((predict(ids)[at] - before).abs().max() > 1e-4)
        before = predict(ids)[at]
    return torch.stack(seen)


# ------------------------------------------------------------------ serve_prompts


@right("serve_prompts")
def one_long_table(embeddings, mask, prompts, which):
    """All prompts are padded first, with an empty one at the end, which −1 picks."""
    P, d = max(map(len, prompts)), embeddings.shape[2]
    table = [F.pad(prompt, (0, 0, P - len(prompt), 0)) for prompt in prompts]
    table = torch.stack([*table, torch.zeros(P, d)])
    lengths = torch.tensor([*map(len, prompts), 0])
    shown = torch.arange(P) >= (P - lengths[which])[:, None]
    return torch.cat([table[which], embeddings], 1), torch.cat([shown.long(), mask], 1)


@right("serve_prompts")
def with_anything_in_the_padding(embeddings, mask, prompts, which):
    P = max(map(len, prompts))
    rows = torch.cat([torch.randn(len(which), P, embeddings.shape[2]), embeddings], dim=1)
    shown = F.pad(mask.double(), (P, 0))
    for row, i in enumerate(which):
        if i != -1:
            rows[row, P - len(prompts[i]) : P] = prompts[i]
            shown[row, P - len(prompts[i]) : P] = 1
    return rows, shown


@wrong("serve_prompts", "RuntimeError")
def as_if_all_were_equally_long(embeddings, mask, prompts, which):
    rows = torch.stack([prompts[i] for i in which])
    return torch.cat([rows, embeddings], 1), F.pad(mask, (rows.shape[1], 0), value=1)


@wrong("serve_prompts", "the padding is put between a short prompt and its text")
def padded_by_torch(embeddings, mask, prompts, which):
    from torch.nn.utils.rnn import pad_sequence

    table = pad_sequence([*prompts, prompts[0][:0]], batch_first=True)
    shown = pad_sequence([torch.ones(len(p)).long() for p in [*prompts, []]], batch_first=True)
    return torch.cat([table[which], embeddings], 1), torch.cat([shown[which], mask], 1)


# ------------------------------------------------------------------ prepend_prompt


def hunted(mask=False, labels=False, learns=False):
    """The stub, with some of its faults mended."""
    mask_fixed, labels_fixed = mask, labels

    def prepend_prompt(embeddings, mask, labels, prompt):
        batch, p = len(embeddings), len(prompt)
        given = prompt if learns else prompt.data
        virtual = given.to(embeddings.dtype).expand(batch, -1, -1)
        if mask is not None:
            ones = mask.new_ones(batch, p)
            mask = torch.cat([ones, mask] if mask_fixed else [mask, ones], dim=1)
        if labels is not None:
            ignored = labels.new_full((batch, p), -100)
            if not labels_fixed:
                labels = torch.cat([labels[:, 1:], ignored[:, :1]], dim=1)
            labels = torch.cat([ignored, labels], dim=1)
        return torch.cat([virtual, embeddings], dim=1), mask, labels

    return prepend_prompt


mended = hunted(mask=True, labels=True, learns=True)
right("prepend_prompt")(mended)
wrong("prepend_prompt", "the mask's ones are put after the text")(hunted())  # the stub as given
wrong("prepend_prompt", "each position holds the next token: a Hugging")(hunted(mask=True))
wrong("prepend_prompt", "no gradient reaches the prompt")(hunted(mask=True, labels=True))


@answers.hunt("prepend_prompt")
def with_bugs(bugs):
    text = " ".join(bugs)
    return hunted("mask" not in text, "shifted" not in text, "gradient" not in text)


@wrong("prepend_prompt", "your function raised AttributeError: 'NoneType'")
def mask_required(embeddings, mask, labels, prompt):
    mask = torch.cat([mask.new_ones(len(mask), len(prompt)), mask], 1)
    joined, _, labels = mended(embeddings, None, labels, prompt)
    return joined, mask, labels


@right("prepend_prompt")
def with_ones_of_floats(embeddings, mask, labels, prompt):
    """As in PEFT, whose part of the mask need not have the dtype of the text's."""
    joined, _, labels = mended(embeddings, None, labels, prompt)
    if mask is not None:
        mask = torch.cat([torch.ones(len(mask), len(prompt)), mask], dim=1)
    return joined, mask, labels


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
