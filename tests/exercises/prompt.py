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


# ------------------------------------------------------------------ prompt_ensemble


@wrong("prompt_ensemble", "nothing was raised, where ValueError was expected")
def zip_stops(prompts, weights):
    return sum(w * p for w, p in zip(weights, prompts, strict=False)) / sum(weights)


@wrong("prompt_ensemble", "wrong values")
def one_after_the_other(prompts, weights):
    mean, *others = prompts
    for prompt, weight in zip(others, weights[1:], strict=True):
        mean = (1 - weight) * mean + weight * prompt
    return mean


@right("prompt_ensemble")
def by_zip(prompts, weights):
    return sum(w * p for w, p in zip(weights, prompts, strict=True)) / sum(weights)


@right("prompt_ensemble")
def by_matmul(prompts, weights):
    if len(prompts) != len(weights):
        raise ValueError("as many weights as prompts, please")
    row, flat = torch.tensor([weights]).float(), torch.stack(prompts).flatten(1)
    return (row @ flat / row.sum()).view_as(prompts[0])


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
