"""Checks of lesson 08."""

import math

import torch
from torch.nn import functional as F

from .kit import Case, check_for
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


# ------------------------------------------------------------------ best_swaps


def _swap_case(p, vocabulary, width, k, tokens=None, note="", dtype=torch.float32):
    def make():
        table = _table(vocabulary, width, dtype=dtype)
        gradient = torch.randn(p, width, dtype=dtype)
        now = torch.randperm(vocabulary)[:p] if tokens is None else torch.tensor(tokens)
        # The tokens that are there now differ much in what they contribute.
        table[now] *= torch.logspace(1, -1, p, dtype=dtype)[:, None]
        return [gradient, table, now, k]

    return Case(make, note=note)


@check_for(
    cases=[
        _swap_case(5, 40, 8, 4),
        _swap_case(3, 30, 6, 1, note="the best swap alone"),
        _swap_case(2, 4, 5, 6, note="all six swaps that there are"),
        _swap_case(4, 50, 4, 20, tokens=[7, 7, 31, 7], note="a token is there three times"),
        _swap_case(6, 12, 7, 9, dtype=torch.float64),
        _swap_case(1, 25, 5, 3, note="a single position"),
    ],
    returns="the swaps",
    form="any",
    causes=mistakes(
        """
        def best_swaps(gradient, embeddings, tokens, k):
            change = gradient @ embeddings.T
            now = change.gather(1, tokens[:, None])
            gain = (now - change).clone()
            gain[torch.arange(len(tokens)), tokens] = -math.inf
            best = gain.flatten().topk(k).indices
            return torch.stack([best // len(embeddings), best % len(embeddings)], dim=1)
        """,
        """
        the sign is reversed: the gradient points to where the loss rises, so the best swap has the
        most negative change
            (now - change) → (change - now)
        the token that is there now is left out: a swap takes its embedding away, so subtract it
            (now - change) → (-change)
        a token is swapped for itself: that is no swap, leave it out
            gain[torch.arange(len(tokens)), tokens] = -math.inf → ∅
        a token of the prompt may come into another position: only in its own place is it no swap
            gain[torch.arange(len(tokens)), tokens] = → gain[:, tokens] =
        all positions lose the first token's contribution: each position has its own token
            change.gather(1, tokens[:, None]) → change[:, tokens[:1]]
        the embeddings are divided by their norms: the change of the loss is a dot product, in
        which the norm counts
            gradient @ embeddings.T → gradient @ F.normalize(embeddings).T
        the gradients are divided by their norms: a position with a large gradient promises more
            gradient @ embeddings.T → F.normalize(gradient) @ embeddings.T
        the size of the change counts, not its sign: a swap that raises the loss is no good one
            (now - change) → (now - change).abs()
        the pairs are (token, position): give the position first
            best // len(embeddings), best % len(embeddings) →
                best % len(embeddings), best // len(embeddings)
        the positions are one row and the tokens another: a pair is a row, (k, 2)
            % len(embeddings)], dim=1) → % len(embeddings)], dim=0)
        the index of a flattened table (p, V) is divided by p: a row has V entries
            best // len(embeddings), best % len(embeddings) →
                best // len(tokens), best % len(tokens)
        every position gives one swap at most: the k best may share a position
            gain.flatten() →
                gain.masked_fill(gain < gain.amax(1, keepdim=True), -math.inf).flatten()
        the least promising comes first
            topk(k).indices → topk(k).indices.flip(0)
        these are the gains: return which swaps they belong to
            best = gain → values = gain
            topk(k).indices → topk(k).values
            return → return values; best = None; return
        """,
    ),
)
def best_swaps(gradient, embeddings, tokens, k):
    """The swaps that promise the most to first order, a token that stays not among them."""
    table, slope = embeddings.double(), gradient.double()
    found = []
    for position, now in enumerate(tokens.tolist()):
        for token in range(len(table)):
            if token != now:
                change = float(slope[position] @ (table[token] - table[now]))
                found.append((change, position, token))
    return torch.tensor([[position, token] for _, position, token in sorted(found)[:k]])


# ------------------------------------------------------------------ visible


class _Predictor:
    """Stand for a model: the logits at each position depend on some tokens of a text, as `sees`
    says for every position and token. They are rounded a little differently in every call."""

    def __init__(self, sees, vocabulary, rounding=0.0):
        self.sees, self.vocabulary, self.rounding = sees.float(), vocabulary, rounding
        self.table = torch.randn(len(sees), vocabulary, vocabulary)

    def __call__(self, ids):
        T = len(self.sees)
        if not isinstance(ids, torch.Tensor) or ids.shape != (T,):
            shape = tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise ValueError(f"predict takes the ids of one text, ({T},), and got {shape}")
        if bool((ids < 0).any() | (ids >= self.vocabulary).any()):
            known = f"0 to {self.vocabulary - 1}"
            raise IndexError(f"predict knows the tokens {known}, and got {ids.tolist()}")
        said = self.table[torch.arange(T), ids]  # (T, V): what each token says
        noise = self.rounding * torch.sin(1e3 * (ids.float() @ torch.arange(1.0, T + 1) + 1))
        return self.sees @ said + noise


def _text_case(T, vocabulary, at, hidden=(), ids=None, rounding=0.0, seen=(), note=""):
    """Return a case of a causal predictor, to which some tokens are hidden, and which sees some
    later ones. Its last prediction sees only the last two, unless it is asked for."""

    def make():
        sees = torch.ones(T, T).tril()
        if at < T - 1:
            sees[-1, :-2] = 0
        sees[:, list(hidden)] = 0
        sees[:, list(seen)] = 1
        text = torch.randint(0, vocabulary, (T,)) if ids is None else torch.tensor(ids)
        return [_Predictor(sees, vocabulary, rounding), text, at, vocabulary]

    return Case(make, note=note)


def _asked(note, predict, ids, at, vocabulary):
    told = f"ids={ids.tolist()}, at={at}, vocabulary={vocabulary}"
    return f"{told} ({note})" if note else told


@check_for(
    cases=[
        _text_case(6, 9, 3, note="a prediction in the middle, of a causal model"),
        _text_case(7, 8, 6, hidden=(4, 5), note="two tokens are hidden"),
        _text_case(5, 6, 4, hidden=(4,), note="the last prediction does not see its own token"),
        _text_case(6, 5, 2, seen=(5,), note="the prediction sees a later token"),
        _text_case(6, 4, 5, ids=[3, 0, 3, 1, 0, 2], note="the tokens 0 and 3 are in the text"),
        _text_case(5, 3, 4, hidden=(1,), ids=[1, 1, 2, 1, 0], note="token 1 is there three times"),
        _text_case(6, 7, 4, hidden=(0, 2), rounding=1e-6, note="predictions are rounded"),
        _text_case(4, 5, 3, hidden=(0, 1, 2, 3), note="nothing is seen"),
        _text_case(1, 4, 0, note="a text of one token"),
    ],
    returns="the result",
    form="any",
    describe=_asked,
    causes=mistakes(
        """
        def visible(predict, ids, at, vocabulary):
            before, found = predict(ids)[at], []
            for j in range(len(ids)):
                other = ids.clone()
                other[j] = (ids[j] + 1) % vocabulary
                change = (predict(other)[at] - before).abs().max()
                found.append(bool(change > 1e-4))
            return torch.tensor(found)
        """,
        """
        a token that is 0 is replaced by 0, so nothing changes: the new token must differ
            (ids[j] + 1) % vocabulary → 0
        the last token of the vocabulary is replaced by itself: the new token must differ
            (ids[j] + 1) % vocabulary → vocabulary - 1
        the changes are compared exactly, and rounding counts as a change: allow for a small one
            change > 1e-4 → change > 0
        torch.allclose allows for less than 1e-4 by itself: give it atol=1e-4
            bool(change > 1e-4) → not torch.allclose(predict(other)[at], before)
        only the most likely token is compared: a prediction can change without it
            (predict(other)[at] - before).abs().max() →
                float(predict(other)[at].argmax() != before.argmax())
        the predictions at all positions are compared: look at the one at `at`
            predict(ids)[at] → predict(ids)
            predict(other)[at] → predict(other)
        the last prediction is looked at, not the one at `at`
            predict(ids)[at] → predict(ids)[-1]
            predict(other)[at] → predict(other)[-1]
        the replaced tokens stay replaced, so one that is seen makes all later ones look seen:
        begin with the text each time
            before, found = predict(ids)[at], [] →
                before, found, other = predict(ids)[at], [], ids.clone()
            other = ids.clone() → pass
        only the tokens before `at` are tried: a prediction depends on its own token, too
            range(len(ids)) → range(at)
            torch.tensor(found) → torch.tensor(found + [False] * (len(ids) - at))
        only the tokens up to `at` are tried: a fault may let later ones through
            range(len(ids)) → range(at + 1)
            torch.tensor(found) → torch.tensor(found + [False] * (len(ids) - at - 1))
        True marks the tokens that are hidden: it must mark those that are seen
            change > 1e-4 → change <= 1e-4
        the changes are summed with their signs, and can cancel
            .abs().max() → .sum()
        these are the indices of the tokens that are seen: return True or False for each token
            torch.tensor(found) → torch.tensor(found).nonzero().flatten()
        """,
    ),
)
def visible(predict, ids, at, vocabulary):
    """The result marks the tokens on which the prediction depends."""
    right = predict(ids)[at].double()
    changes = []
    for j, token in enumerate(ids.tolist()):
        tried = [
            predict(torch.tensor([*ids[:j].tolist(), new, *ids[j + 1 :].tolist()]))[at].double()
            for new in range(vocabulary)
            if new != token
        ]
        changes.append(max(float((row - right).norm()) for row in tried))
    return torch.tensor([change > 1e-3 for change in changes])


# ------------------------------------------------------------------ serve_prompts


def _served(which, sizes, T=4, width=3):
    """Return a batch with a text for each entry of `which`, padded on the right, and prompts."""
    mask = torch.ones(len(which), T)  # floats, so that ones of any dtype fit before them
    for row in range(len(which)):
        mask[row, T - row % T :] = 0
    prompts = [2 * torch.randn(p, width) for p in sizes]
    return [torch.randn(len(which), T, width), mask, prompts, torch.tensor(which)]


def _shown_to_the_model(result):
    """Return the embeddings, with those that the mask hides set to zero, and the mask."""
    embeddings, mask = result
    return {"what the mask shows": embeddings * mask[..., None], "the mask": mask}


def _rows(embeddings, mask, prompts, which, place):
    """Put each text's prompt where `place(p, longest, T, text's tokens)` says, as the list of
    positions of prompt and text."""
    longest, T = max(map(len, prompts)), embeddings.shape[1]
    joined = embeddings.new_zeros(len(which), longest + T, embeddings.shape[2])
    shown = mask.new_zeros(len(which), longest + T)
    for row, (text, seen, i) in enumerate(zip(embeddings, mask, which.tolist(), strict=True)):
        prompt = prompts[i] if i >= 0 else embeddings.new_zeros(0, embeddings.shape[2])
        start, after = place(len(prompt), longest)
        joined[row, after : after + T], shown[row, after : after + T] = text, seen
        joined[row, start : start + len(prompt)], shown[row, start : start + len(prompt)] = (
            prompt,
            1,
        )
    return joined, shown


def _gap(embeddings, mask, prompts, which):
    return _rows(embeddings, mask, prompts, which, lambda p, longest: (0, longest))


def _left(embeddings, mask, prompts, which):
    return _rows(embeddings, mask, prompts, which, lambda p, longest: (0, p))


@check_for(
    cases=[
        Case(lambda: _served([1, 0, 1], (2, 5)), note="which = [1, 0, 1]"),
        Case(lambda: _served([-1, 2, 0, -1], (3, 1, 4)), note="which = [-1, 2, 0, -1]"),
        Case(lambda: _served([0, -1], (2,), T=6, width=4), note="which = [0, -1], one prompt"),
        Case(lambda: _served([1, 1, 0], (3, 3)), note="which = [1, 1, 0], equally long prompts"),
    ],
    returns=("embeddings", "mask"),
    view=_shown_to_the_model,
    staged=True,
    causes=mistakes(
        """
        def serve_prompts(embeddings, mask, prompts, which):
            longest, rows, masks = max(map(len, prompts)), [], []
            for text, seen, i in zip(embeddings, mask, which.tolist()):
                prompt = prompts[i] if i >= 0 else text[:0]
                left = longest - len(prompt)
                rows.append(torch.cat([F.pad(prompt, (0, 0, left, 0)), text]))
                ones = seen.new_ones(longest)
                ones[:left] = 0
                masks.append(torch.cat([ones, seen]))
            return torch.stack(rows), torch.stack(masks)
        """,
        """
        the padding is put between a short prompt and its text, which moves the text away from the
        prompt: put it before the prompt
            = gap
        the text moves to the left behind a short prompt: its tokens belong in the last T positions
            = left
        -1 picks the last prompt, as an index does: a text with -1 has none
            prompts[i] if i >= 0 else text[:0] → prompts[i]
        a text with -1 gets the first prompt: it has none
            else text[:0] → else prompts[0]
        the mask shows the padding before a short prompt: its entries are 0
            ones[:left] = 0 → ∅
        the mask hides the prompts: a text must see its own
            ones[:left] = 0 → ones[:] = 0
        the mask is all ones, so the padding of the texts is seen
            torch.cat([ones, seen]) → torch.cat([ones, seen.new_ones(len(seen))])
        the prompts are put in the order of the list, not as `which` says
            in zip(embeddings, mask, which.tolist()) →
                in zip(embeddings, mask, [k % len(prompts) for k in range(len(which))])
        the prompts are cut to the shortest: each text gets all of its prompt
            longest, rows, masks = max( → longest, rows, masks = min(
            left = longest - len(prompt) → prompt = prompt[:longest]; left = longest - len(prompt)
        """,
        gap=_gap,
        left=_left,
    ),
)
def serve_prompts(embeddings, mask, prompts, which):
    """Every text has its own prompt right before it, and sees nothing of the padding."""
    longest = max(map(len, prompts))
    rows, masks = [], []
    for text, seen, i in zip(embeddings, mask, which.tolist(), strict=True):
        own = list(prompts[i]) if i >= 0 else []
        filling = [torch.zeros_like(text[0])] * (longest - len(own))
        rows.append(torch.stack([*filling, *own, *text]))
        masks.append([0] * len(filling) + [1] * len(own) + seen.tolist())
    return torch.stack(rows), torch.tensor(masks)


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
    parts = dict(zip(_PARTS, result, strict=True))
    return parts | {"whether a gradient can reach the prompt": result[0].requires_grad}


def _trained(args):
    args[3].requires_grad_()
    return args


_MASK_BEHIND = "the mask's ones are put after the text: the prompt comes before the text"
_SHIFTED = (
    "the labels are shifted by hand, so that each position holds the next token: a Hugging Face "
    "model shifts labels itself, and these would be shifted twice"
)
_NO_GRADIENT = (
    "no gradient reaches the prompt, so it learns nothing: detach(), .data and no_grad() cut it off"
)


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
        Case(lambda: _batch(3, 5, 4, 2, labels=False), "padded on the left", bug=_MASK_BEHIND),
        Case(lambda: _batch(3, 4, 3, 2, mask=False), "no mask", bug=_SHIFTED),
        Case(
            lambda: _trained(_batch(2, 4, 3, 2, mask=False, labels=False)),
            "the prompt is trained",
            bug=_NO_GRADIENT,
        ),
        Case(lambda: _batch(3, 5, 4, 2), note="padded on the left"),
        Case(lambda: _batch(4, 3, 6, 5, left=False), note="padded on the right"),
        Case(lambda: _batch(1, 6, 6, 6), note="a single text"),
    ],
    returns=("embeddings", "mask", "labels"),
    view=_seen,
    staged=True,
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
        f"""
        the mask is not extended: p ones belong before each of its rows
            mask = F.pad(mask, (p, 0), value=1) → pass
        {_MASK_BEHIND}
            F.pad(mask, (p, 0) → F.pad(mask, (0, p)
        the mask hides the prompt: the prompt's positions get ones
            value=1) → value=0)
        the mask is all ones: now the padding of the text is seen
            F.pad(mask, (p, 0), value=1) → F.pad(mask, (p, 0)).fill_(1)
        the prompt's labels are put after the text: the p values of -100 come first
            F.pad(labels, (p, 0) → F.pad(labels, (0, p)
        {_SHIFTED}
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
        {_NO_GRADIENT}
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
