"""Checks of lesson 16."""

import copy
import math
import re
import statistics
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from ..testing.tiny import tiny_llama
from .diagnosis import diagnosis
from .kit import Case, check_for
from .mistakes import mistakes

# ------------------------------------------------------------------ sum_reward

_WORDS = "other words beside the sum are paid"
_LONGER = "a longer number is paid if the sum's digits occur in it"
_SEVERAL = "several numbers are paid if one of them is the sum"
_ENDLESS = "an answer that does not end is paid: the line break belongs to it"


def _paid(note, text, a, b):
    who = f" ({note})" if note else ""
    return f"{text!r} for {a} + {b}, which is {a + b}{who}"


@check_for(
    cases=[
        Case(lambda: ["30 feet.\n", 12, 18], bug=_WORDS),
        Case(lambda: ["130\n", 12, 18], bug=_LONGER),
        Case(lambda: ["28 29 30 31 32\n", 12, 18], bug=_SEVERAL),
        Case(lambda: ["30", 12, 18], bug=_ENDLESS),
        Case(lambda: ["62 players\n", 25, 37], bug=_WORDS),
        Case(lambda: ["12 + 18 = 30\n", 12, 18]),
        Case(lambda: ["30\n", 12, 18]),
        Case(lambda: ["89\n", 49, 40]),
        Case(lambda: ["20\n", 10, 10]),
        Case(lambda: ["31\n", 12, 18]),
        Case(lambda: ["3\n", 12, 18]),
        Case(lambda: ["\n", 12, 18], note="an empty line"),
        Case(lambda: ["", 12, 18], note="no text"),
        Case(lambda: ["-30\n", 12, 18]),
        Case(lambda: ["030\n", 12, 18], note="a zero before the sum"),
        Case(lambda: ["30\n\n", 12, 18], note="two line breaks"),
        Case(lambda: [" 30\n", 12, 18], note="a blank before the sum"),
        Case(lambda: ["three\n", 12, 18]),
    ],
    returns="the reward",
    describe=_paid,
    causes=mistakes(
        """
        def sum_reward(text, a, b):
            wanted = f"{a + b}\\n"
            return float(text == wanted)
        """
    ),
)
def sum_reward(text, a, b):
    """Exactly the sum and its line break are paid, and none of the loopholes is."""
    found = re.fullmatch(r"([0-9]+)\n", text)
    return 1.0 if found and found[1] == str(a + b) else 0.0


# ------------------------------------------------------------------ group_advantages


def _right_or_wrong(*rows):
    return [torch.tensor(rows, dtype=torch.float32)]


@check_for(
    cases=[
        Case(lambda: [torch.rand(3, 8)]),
        Case(
            lambda: _right_or_wrong([1, 0, 0, 0], [0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1]),
            note="right or wrong, four prompts with four answers each",
        ),
        Case(
            lambda: _right_or_wrong([1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]),
            note="in two groups all rewards are equal",
        ),
        Case(lambda: [torch.rand(1, 6, dtype=torch.float64)], note="a single prompt"),
        Case(
            lambda: [0.5 + 1e-3 * torch.rand(2, 7, dtype=torch.float64)],
            note="the rewards of a group are close",
        ),
    ],
    returns="the advantages",
    causes=mistakes(
        """
        def group_advantages(rewards):
            mean = rewards.mean(1, keepdim=True)
            std = rewards.std(1, keepdim=True)
            return (rewards - mean) / (std + 1e-4)
        """,
        """
        the mean is that of the whole batch: each prompt has a mean of its own
            rewards.mean(1, keepdim=True) → rewards.mean()
        the standard deviation is that of the whole batch: each prompt has its own
            rewards.std(1, keepdim=True) → rewards.std()
        mean and standard deviation are those of the whole batch: each prompt has its own
            rewards.mean(1, keepdim=True) → rewards.mean()
            rewards.std(1, keepdim=True) → rewards.std()
        the groups are mixed: a row is a group, so take mean and standard deviation over dimension 1
            rewards.mean(1, keepdim=True) → rewards.mean(0, keepdim=True)
            rewards.std(1, keepdim=True) → rewards.std(0, keepdim=True)
        the standard deviation divides by n: the unbiased one divides by n − 1, as torch.std does
            rewards.std(1, keepdim=True) → rewards.std(1, keepdim=True, correction=0)
        1e-4 is missing below the fraction, so a group of equal rewards gives 0 / 0, which is NaN
            (std + 1e-4) → std
        1e-4 is inside of the root: add it to the standard deviation
            (std + 1e-4) → (std.square() + 1e-4).sqrt()
        1e-4 is added to the mean: it belongs below the fraction
            (rewards - mean) / (std + 1e-4) → (rewards - mean - 1e-4) / std.clamp(min=1e-9)
        this divides by the variance: divide by its root
            rewards.std( → rewards.var(
        the mean is not subtracted
            (rewards - mean) → rewards
        the standard deviation is left out: divide by it
            / (std + 1e-4) → ∅
        the sign is reversed: an answer that is better than its group has a positive advantage
            (rewards - mean) → (mean - rewards)
        a softmax is no advantage: subtract the mean and divide by the standard deviation
            return (rewards - mean) / (std + 1e-4) → return rewards.softmax(1)
        """,
    ),
)
def group_advantages(rewards):
    """Each answer is compared with its own group, and a group of equal rewards gets zeros."""
    rows = []
    for row in rewards.double().tolist():
        mean, spread = statistics.fmean(row), statistics.stdev(row)
        rows.append([(reward - mean) / (spread + 1e-4) for reward in row])
    return torch.tensor(rows, dtype=rewards.dtype)


# ------------------------------------------------------------------ policy_gradient_loss


def _sampled(lengths, tokens=None, drift=0.0, dtype=torch.float32):
    """Return log-probabilities of answers of these lengths under a policy, and under the one that
    wrote them, and the answers' advantages. Ratios are never close to where the clip begins."""
    tokens = tokens or max(lengths)
    old = -3 * torch.rand(len(lengths), tokens, dtype=dtype) - 0.1
    change = drift * torch.where(torch.rand(old.shape) < 0.5, 0.1, 0.6).to(dtype)
    change = change * (torch.rand(old.shape) - 0.5).sign()
    mask = (torch.arange(tokens) < torch.tensor(lengths)[:, None]).to(dtype)
    # What stands after the end of an answer is a number like any other.
    advantages = torch.randn(len(lengths), dtype=dtype)
    advantages = advantages + 0.3 * advantages.sign()
    return [old + change, old.clone(), advantages, mask]


@check_for(
    cases=[
        Case(lambda: _sampled((3, 5, 1, 4, 2), drift=0.1), note="all ratios are close to 1"),
        Case(
            lambda: [*_sampled((3, 5, 1, 4, 2), drift=0.1), "grpo"],
            note="all ratios are close to 1",
        ),
        Case(lambda: _sampled((2, 4, 3, 4, 1), drift=1), note="the policy has moved away"),
        Case(lambda: [*_sampled((2, 4, 3, 4, 1), drift=1), "grpo"], note="it has moved away"),
        Case(lambda: [*_sampled((4, 2, 3), drift=1), "dapo", 0.05], note="a narrow clip"),
        Case(lambda: [*_sampled((4, 2, 3), drift=1), "grpo", 0.9], note="a wide clip"),
        Case(lambda: _sampled((2, 3, 3), 5), note="before the first step: both are equal"),
        Case(
            lambda: [*_sampled((2, 3, 3), 5, dtype=torch.float64), "grpo"],
            note="before the first step: both are equal",
        ),
    ],
    returns="the loss",
    gradients=("logprobs",),
    causes=mistakes(
        """
        def policy_gradient_loss(
            logprobs, old_logprobs, advantages, mask, kind="dapo", clip=0.2
        ):
            ratio = (logprobs - old_logprobs).exp()
            clipped = ratio.clamp(1 - clip, 1 + clip)
            A = advantages[:, None]
            each = -torch.minimum(ratio * A, clipped * A)
            if kind == "grpo":
                return ((each * mask).sum(1) / mask.sum(1)).mean()
            return (each * mask).sum() / mask.sum()
        """,
        """
        the sign is reversed: an optimiser makes the loss smaller
            each = -torch → each = torch
        the ratio is upside down: it is the policy's probability over that of the policy that
        wrote the answer
            (logprobs - old_logprobs) → (old_logprobs - logprobs)
        exp is missing: a difference of log-probabilities is the logarithm of the ratio
            .exp() → ∅
        these are log-probabilities times advantages: take the ratio
            (logprobs - old_logprobs).exp() → logprobs
            clipped = ratio.clamp(1 - clip, 1 + clip) → clipped = ratio
        nothing is clipped
            clipped = ratio.clamp(1 - clip, 1 + clip) → clipped = ratio
        only the clipped ratio counts: take the smaller of the two products
            torch.minimum(ratio * A, clipped * A) → (clipped * A)
        the larger of the two products is taken: take the smaller one, before the minus
            torch.minimum → torch.maximum
        the smaller ratio is taken, before the advantage: multiply first, for a negative advantage
        turns the order around
            torch.minimum(ratio * A, clipped * A) → (torch.minimum(ratio, clipped) * A)
        the ratio is clipped above only: clip it at 1 − clip too
            clamp(1 - clip, 1 + clip) → clamp(max=1 + clip)
        the ratio is clipped at 0.2 whatever `clip` says
            clamp(1 - clip, 1 + clip) → clamp(0.8, 1.2)
        the clip is around 0: clip the ratio to 1 − clip and 1 + clip
            clamp(1 - clip, 1 + clip) → clamp(-clip, clip)
        what comes after an answer's end counts too: multiply by the mask
            (each * mask).sum(1) → each.sum(1)
            (each * mask).sum() → each.sum()
        the mean runs over all positions, padding included: divide by the number of tokens
            (each * mask).sum(1) / mask.sum(1) → (each * mask).mean(1)
            (each * mask).sum() / mask.sum() → (each * mask).mean()
        "grpo" divides by the width of the table: divide each sum by its own answer's length
            / mask.sum(1)).mean() → / mask.shape[1]).mean()
        `kind` is overlooked: "grpo" is the mean over the answers of each answer's mean
            return ((each * mask).sum(1) / mask.sum(1)).mean() → pass
        "dapo" and "grpo" are swapped
            kind == "grpo" → kind != "grpo"
        "dapo" divides by the number of answers: divide by the number of tokens in all of them
            (each * mask).sum() / mask.sum() → (each * mask).sum() / len(mask)
        "grpo" adds up the answers' means: take their mean
            / mask.sum(1)).mean() → / mask.sum(1)).sum()
        one ratio is taken for a whole answer: each token has its own
            (logprobs - old_logprobs) → ((logprobs - old_logprobs) * mask).sum(1, keepdim=True)
        the advantages run along the positions: each answer has one, so write advantages[:, None]
            advantages[:, None] → advantages
        """,
    ),
)
def policy_gradient_loss(logprobs, old_logprobs, advantages, mask, kind="dapo", clip=0.2):
    """Both means and their gradients, with clipped ratios and without."""
    terms, every = [], mask.sum()
    for now, before, advantage, kept in zip(logprobs, old_logprobs, advantages, mask, strict=True):
        count = kept.sum()
        share = count * len(mask) if kind == "grpo" else every
        for new, old, keep in zip(now, before, kept, strict=True):
            if keep:
                ratio = (new - old).exp()
                bound = 1 + clip if advantage > 0 else 1 - clip
                beyond = ratio > bound if advantage > 0 else ratio < bound
                terms.append(-(bound if beyond else ratio) * advantage / share)
    return torch.stack(terms).sum()


# ------------------------------------------------------------------ diagnose_curves

# Of each run of data/results/broken_rewards.csv: what is wrong, and what in its curves says so.
_CURVES = {
    "A": (
        "any number is paid",
        "nine answers in ten are paid from the third step on, and yet −log π stays far above 0: "
        "the model is sure of its reward, and not of its answer",
    ),
    "B": (
        "asked in a chat",
        "no answer is ever paid, so every group is flat and nothing can change",
    ),
    "C": (
        "ten times the learning rate",
        "its reward rises, then falls to nothing while −log π falls to nearly 0, so the model "
        "writes the same answer again and again, and a wrong one",
    ),
    "D": (
        "a hundredth of the learning rate",
        "some answers are paid in every step, as in the healthy run, and yet −log π stays where it "
        "began",
    ),
}


@check_for(**diagnosis(_CURVES))
def diagnose_curves():
    """Every run has its fault. What shows it:"""


# ------------------------------------------------------------------ reward_step

_TOP_K = "generate() draws from the 50 likeliest tokens alone, unless you pass top_k=0"
_BATCH = (
    "rewards are compared with the whole batch: an answer competes with those to its own prompt"
)
_END = "the end token is masked as if it were padding, so no answer learns to end"
_ATTACHED = (
    "the old log-probabilities are not detached: in the ratio's gradient both cancel, and it is 0"
)
_STOP = 7  # the end token


@cache
def _writer(vocabulary: int, ends: bool) -> nn.Module:
    """Return a language model that writes the end token at every third position, or never."""
    model = tiny_llama(vocab_size=vocabulary, num_hidden_layers=1)
    head = nn.utils.skip_init(nn.Linear, model.lm_head.in_features, vocabulary)
    head.weight.data, head.bias.data = model.lm_head.weight.data, torch.zeros(vocabulary)
    head.bias.data[_STOP] = math.log(vocabulary / 2) if ends else -40.0
    model.lm_head = head
    return model.requires_grad_(False)


def _reward(answer):
    return answer[0] % 5 + answer[1] / 1000  # no two answers to a prompt are worth the same


def _step_case(prompts, vocabulary, ends=False, trains=False, note="", bug=""):
    def make():
        model = _writer(vocabulary, ends)
        configs = {id(config): config for config in (model.config, model.generation_config)}
        model = copy.deepcopy(model, configs)  # copying those takes longer than copying the model
        model.lm_head.weight.requires_grad_(trains)
        asked = torch.randint(8, vocabulary, (prompts, 4))
        return [model, asked, _reward, 6, _STOP, 3]

    return Case(make, note=note, bug=bug)


_PARTS = ("the answers", "the advantages", "the mask", "the loss")


def _trained(result):
    """Return the parts of a step, of its loss the gradient alone: in a group whose answers are
    equally long, advantages and so the loss add up to 0, whatever it teaches."""
    *parts, loss = result
    return dict(zip(_PARTS, [*parts, loss - loss.detach()], strict=True))


@check_for(
    cases=[
        _step_case(1, 200, note="one prompt, 200 tokens to choose from, no end", bug=_TOP_K),
        _step_case(2, 40, note="two prompts, no end", bug=_BATCH),
        _step_case(1, 40, ends=True, note="one prompt, answers end early", bug=_END),
        _step_case(1, 40, trains=True, note="one prompt, the head trains", bug=_ATTACHED),
        _step_case(3, 120, ends=True, trains=True, note="three prompts, the head trains"),
    ],
    returns=_PARTS,
    view=_trained,
    staged=True,
    gradients=("model",),
    causes=mistakes(
        """
        def reward_step(model, prompts, reward, size, end, tokens):
            rows = prompts.repeat_interleave(size, dim=0)
            start, seen = rows.shape[1], torch.ones_like(rows)
            ids = model.generate(
                rows,
                attention_mask=seen,
                do_sample=True,
                top_k=0,
                max_new_tokens=tokens,
                eos_token_id=end,
                pad_token_id=end,
            )
            answers = ids[:, start:]
            ends = (answers == end).long()
            mask = (ends.cumsum(1) - ends == 0).float()
            rewards = torch.tensor([reward(answer) for answer in answers.tolist()])
            groups = rewards.view(-1, size)
            centred = groups - groups.mean(1, keepdim=True)
            advantages = (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten()
            logits = model(ids).logits[:, start - 1 : -1]
            logprobs = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]
            old_logprobs = logprobs.detach()
            ratio = (logprobs - old_logprobs).exp()
            loss = -(ratio * advantages[:, None] * mask).sum() / mask.sum()
            return answers, advantages, mask, loss
        """,
        f"""
        {_TOP_K}
            top_k=0, → ∅
        {_BATCH}
            groups = rewards.view(-1, size) → groups = rewards[None]
        {_END}
            (ends.cumsum(1) - ends == 0) → (ends == 0)
        {_ATTACHED}
            logprobs.detach() → logprobs
        nothing is sampled: all answers of a group are the likeliest one
            do_sample=True, → do_sample=False,
            top_k=0, → ∅
        the padding after an answer's end counts too: mask it
            (ends.cumsum(1) - ends == 0) → torch.ones_like(answers)
        only the standard deviation is that of the whole batch: each group has its own
            groups.std(1, keepdim=True) → groups.std()
        only the mean is that of the whole batch: each group has its own
            groups.mean(1, keepdim=True) → groups.mean()
        the standard deviation is left out of the advantages
            / (groups.std(1, keepdim=True) + 1e-4) → ∅
        the logits at a position predict the next token: those of the prompt's last one come first
            [:, start - 1 : -1] → [:, start:]
        the sign is reversed: an optimiser makes the loss smaller
            loss = - → loss =
        every answer counts alike, whatever its length: divide by the number of all tokens
            .sum() / mask.sum() → .sum(1).div(mask.sum(1)).mean()
        """,
    ),
)
def reward_step(model, prompts, reward, size, end, tokens):
    """Answers drawn from the whole vocabulary, compared within their group, learned with their end
    token, and a loss with the right gradient. Its value is not compared."""
    settings = dict(do_sample=True, top_k=0, eos_token_id=end, pad_token_id=end)
    ids = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        num_return_sequences=size,
        max_new_tokens=tokens,
        **settings,
    )
    start = prompts.shape[1]
    answers, losses, lengths = ids[:, start:], [], []
    rewards = torch.tensor([[reward(row) for row in answers.tolist()]]).view(-1, size)
    advantages = group_advantages.reference(rewards).flatten()
    mask = torch.zeros(answers.shape)
    scores = model(input_ids=ids).logits[:, start - 1 : -1].transpose(1, 2)
    surprisal = F.cross_entropy(scores, answers, reduction="none")
    for i, row in enumerate(answers.tolist()):
        lengths.append(row.index(end) + 1 if end in row else len(row))
        mask[i, : lengths[i]] = 1
        each = surprisal[i, : lengths[i]]
        losses.append((advantages[i] * (each - each.detach() - 1)).sum())  # a ratio of 1
    return answers, advantages, mask, torch.stack(losses).sum() / sum(lengths)
