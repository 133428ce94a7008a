"""Learn from rewards: sample answers in groups, compare them within the group, and make the better
ones likelier (GRPO, Shao et al. 2024, and the normalisations that came after it).

The loop trains whatever has `requires_grad` and knows no method. It saves work in three places: a
prompt is read once for its whole group, an answer that has ended leaves the batch, and a group
whose answers all got the same reward takes no part in the gradient, to which it would add nothing.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn

KINDS = ("dapo", "grpo", "dr_grpo")


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Return rewards (groups, answers) minus their group's mean, over its unbiased standard
    deviation plus 1e-4. In a group of equal rewards all advantages are 0."""
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    return centered / (rewards.std(dim=1, keepdim=True) + 1e-4)


def policy_gradient_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    kind: str = "dapo",
    clip: float = 0.2,
    *,
    limit: int | None = None,
    reference: torch.Tensor | None = None,
    beta: float = 0.0,
    weighted_kl: bool = True,
) -> torch.Tensor:
    """Return the loss whose gradient makes answers of positive advantage likelier.

    Each token's ratio of probabilities, new over old, times its answer's advantage; where the ratio
    has left 1 ± clip in the direction of the advantage, the token has no gradient any more.

    Args:
        logprobs, old_logprobs: log-probabilities of the sampled tokens (answers, T), now and when
            they were sampled; the old ones without gradient.
        advantages: (answers,).
        mask: (answers, T), 1 on an answer's tokens, its end included, and 0 after it.
        kind: "dapo" divides the sum by the number of all tokens; "grpo" takes the mean of each
            answer and then of the answers; "dr_grpo" divides by answers times `limit`.
        limit: the most tokens an answer may have; T if None.
        reference: log-probabilities (answers, T) of a model not to be left too far behind; with
            it, `beta` times an estimate of the Kullback-Leibler divergence joins each token's loss.
        weighted_kl: whether that estimate is multiplied by the ratio, as TRL does by default
            (`use_bias_correction_kl`): the same value at the first step, another gradient.

    Raises ValueError for another kind."""
    if kind not in KINDS:
        raise ValueError(f"policy_gradient_loss: kind must be one of {KINDS}, not {kind!r}")
    ratio = (logprobs - old_logprobs).exp()
    advantage = advantages[:, None]
    losses = -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    if reference is not None:
        gap = reference - logprobs
        divergence = gap.exp() - gap - 1
        losses = losses + beta * (divergence * ratio if weighted_kl else divergence)
    losses = losses * mask
    if kind == "dapo":
        return losses.sum() / mask.sum().clamp(min=1)
    if kind == "grpo":
        return (losses.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()
    return losses.sum() / (len(losses) * (limit or losses.shape[1]))


@dataclass
class Answers:
    """Hold sampled answers; the `group` answers to one prompt stand in consecutive rows.

    prompts: token ids (P, T₀). ids: token ids (P · group, T); what stands after an answer's end
    means nothing. mask: (P · group, T), 1 up to the end, which counts. logprobs: (P · group, T),
    under the model that sampled, 0 outside the mask. texts: the answers, with the end's own text if
    the model has written it."""

    prompts: torch.Tensor
    group: int
    ids: torch.Tensor
    mask: torch.Tensor
    logprobs: torch.Tensor
    texts: list[str]

    def of_groups(self, chosen: torch.Tensor) -> "Answers":
        """Return the answers of the chosen prompts, a mask (P,)."""
        rows = chosen.repeat_interleave(self.group)
        texts = [text for text, row in zip(self.texts, rows.tolist(), strict=True) if row]
        parts = (t[rows] for t in (self.ids, self.mask, self.logprobs))
        return Answers(self.prompts[chosen], self.group, *parts, texts)


def _as_ids(model: nn.Module, tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Return the token ids (P, T₀) of texts with equally many tokens."""
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or not rows[0]:
        raise ValueError(
            f"prompts of {sorted(lengths)} tokens: all of a batch must have equally many, one at "
            "least, for none is padded here"
        )
    return torch.tensor(rows, device=model.device)


def _read(model: nn.Module, prompts: torch.Tensor, group: int):
    """Read the prompts (P, T₀); return the log-probabilities (P · group, V) of the token that
    follows each of them, and the cache of keys and values. What all prompts begin with is read once
    for all of them, the remainder once for each group."""
    cache, alike = None, (prompts == prompts[0]).all(dim=0).long().cumprod(dim=0).sum().item()
    start = min(alike, prompts.shape[1] - 1) if len(prompts) > 1 else 0
    if start:
        cache = model(prompts[:1, :start], use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(prompts))
    rest = prompts[:, start:]
    output = model(rest, past_key_values=cache, use_cache=True, logits_to_keep=1)
    output.past_key_values.batch_repeat_interleave(group)
    following = output.logits[:, -1].float().log_softmax(-1)
    return following.repeat_interleave(group, dim=0), output.past_key_values


def _picked(following: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return of log-probabilities (..., V) those of the tokens ids (...)."""
    return following.gather(-1, ids[..., None])[..., 0]


@torch.no_grad()
def sample_answers(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    group: int = 8,
    tokens: int = 4,
    *,
    end: str = "\n",
    greedy: bool = False,
    generator: torch.Generator | None = None,
) -> Answers:
    """Continue each prompt `group` times by up to `tokens` tokens, or until the token `end`.

    Sampled at temperature 1 from all of the vocabulary, for the loss takes the answers as the
    model's own; `greedy` takes the likeliest token. Without a generator the global random state is
    used. Raises ValueError for prompts of different lengths or an `end` of several tokens."""
    end_ids = tokenizer(end, add_special_tokens=False)["input_ids"]
    if len(end_ids) != 1:
        raise ValueError(f"sample_answers: end={end!r} is {len(end_ids)} tokens, it must be one")
    ids = _as_ids(model, tokenizer, prompts)
    following, cache = _read(model, ids, group)
    rows = torch.arange(len(ids) * group, device=ids.device)  # those that have not ended
    written = torch.full((len(rows), tokens), end_ids[0], device=ids.device)
    mask, logprobs = torch.zeros(2, *written.shape, device=ids.device)
    for position in range(tokens):
        if greedy:
            new = following.argmax(-1)
        else:
            new = torch.multinomial(following.exp(), 1, generator=generator)[:, 0]
        written[rows, position], mask[rows, position] = new, 1.0
        logprobs[rows, position] = _picked(following, new)
        going = (new != end_ids[0]).nonzero()[:, 0]
        if position + 1 == tokens or not len(going):
            break
        rows = rows[going]
        cache.batch_select_indices(going)
        output = model(new[going][:, None], past_key_values=cache, use_cache=True)
        following, cache = output.logits[:, -1].float().log_softmax(-1), output.past_key_values
    lengths = mask.sum(dim=1).long().tolist()
    parts = [row[:length] for row, length in zip(written.tolist(), lengths, strict=True)]
    longest = max(lengths)
    texts = tokenizer.batch_decode(parts, clean_up_tokenization_spaces=False)
    kept = (t[:, :longest] for t in (written, mask, logprobs))
    return Answers(ids, group, *kept, texts)


def _all_logprobs(model: nn.Module, answers: Answers) -> torch.Tensor:
    """Return the log-probabilities (P · group, T, V) of all tokens at the answers' positions."""
    following, cache = _read(model, answers.prompts, answers.group)
    if answers.ids.shape[1] == 1:
        return following[:, None]
    logits = model(answers.ids[:, :-1], past_key_values=cache, use_cache=True).logits
    return torch.cat([following[:, None], logits.float().log_softmax(-1)], dim=1)


def token_logprobs(model: nn.Module, answers: Answers) -> torch.Tensor:
    """Return the log-probabilities (P · group, T) of the answers' tokens under the model as it is
    now, with gradient; what stands outside the mask means nothing."""
    return _picked(_all_logprobs(model, answers), answers.ids)


@torch.no_grad()
def answer_chances(
    model: nn.Module, tokenizer, prompts: Sequence[str], answers: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each prompt the probability p (P,) that the model, sampled at temperature 1,
    writes exactly this answer, and whether (P,) it writes it when it always takes the likeliest
    token. Nothing is sampled, so nothing is noisy: among k samples is the answer with the
    probability 1 - (1 - p)^k.

    answers: each with its end. They must have equally many tokens, as must the prompts."""
    ids, wanted = _as_ids(model, tokenizer, prompts), _as_ids(model, tokenizer, answers)
    whole = torch.ones(2, *wanted.shape, device=ids.device)
    following = _all_logprobs(model, Answers(ids, 1, wanted, *whole, list(answers)))
    greedy = (following.argmax(-1) == wanted).all(dim=1)
    return _picked(following, wanted).sum(dim=1).exp(), greedy


@dataclass
class RewardHistory:
    """Record `reinforce` step by step: the mean reward, the share of groups with equal rewards, the
    answers' mean length in tokens, the mean of -log π over the sampled tokens, and the seconds of
    all steps."""

    reward: list[float] = field(default_factory=list)
    flat: list[float] = field(default_factory=list)
    length: list[float] = field(default_factory=list)
    surprisal: list[float] = field(default_factory=list)
    seconds: float = 0.0


def reinforce(
    model: nn.Module,
    tokenizer,
    problems: Sequence[tuple[str, tuple]],
    reward: Callable[..., float],
    steps: int = 12,
    *,
    lr: float = 1e-3,
    prompts: int = 8,
    group: int = 8,
    tokens: int = 4,
    end: str = "\n",
    kind: str = "dapo",
    clip: float = 0.2,
    beta: float = 0.0,
    reference: Callable[[nn.Module], AbstractContextManager] | None = None,
    seed: int = 0,
    after: Callable[[RewardHistory], object] | None = None,
) -> RewardHistory:
    """Train what has `requires_grad` in the model by rewards alone, and return the history.

    Each step samples `group` answers to each of `prompts` problems, and takes one step of AdamW
    without weight decay, the gradient's norm limited to 1. The same seed gives the same run on one
    machine; the global random state is not used.

    Args:
        problems: each a prompt and what the reward has to know: `reward(text, *facts)` is given the
            answer's text, with its end if the model has written it.
        beta, reference: with beta > 0, `with reference(model):` makes the model the one not to
            be left too far behind: `disabled` for a model with an adapter.
        after: called with the history after each step, to draw it.

    Raises ValueError if beta comes without reference, or nothing trains."""
    training = [p for p in model.parameters() if p.requires_grad]
    if not training:
        raise ValueError("reinforce: nothing in the model trains")
    if beta and reference is None:
        raise ValueError("reinforce: beta needs reference, which makes the model the old one")
    optimizer = torch.optim.AdamW(training, lr=lr, weight_decay=0.0)
    generator = torch.Generator(model.device).manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    history, queue = RewardHistory(), []
    for _ in range(steps):
        started = time.perf_counter()
        while len(queue) < prompts:
            queue += torch.randperm(len(problems), generator=order).tolist()
        chosen, queue = [problems[k] for k in queue[:prompts]], queue[prompts:]
        answers = sample_answers(
            model, tokenizer, [p for p, _ in chosen], group, tokens, end=end, generator=generator
        )
        facts = [facts for _, facts in chosen for _ in range(group)]
        values = [reward(text, *fact) for text, fact in zip(answers.texts, facts, strict=True)]
        rewards = torch.tensor(values, device=model.device).float().view(prompts, group)
        flat = (rewards == rewards[:, :1]).all(dim=1)
        # With beta, an answer to a flat group is held near the reference and has a gradient.
        taken = torch.ones_like(flat) if beta else ~flat
        if taken.any():
            _step(model, optimizer, answers, rewards, taken, kind, clip, tokens, beta, reference)
        words = answers.mask.sum().item()
        history.reward.append(rewards.mean().item())
        history.flat.append(flat.float().mean().item())
        history.length.append(words / len(answers.texts))
        history.surprisal.append(-answers.logprobs.sum().item() / words)
        history.seconds += time.perf_counter() - started
        if after:
            after(history)
    return history


def _step(model, optimizer, answers, rewards, taken, kind, clip, limit, beta, reference) -> None:
    """Take one step of the optimizer on the groups that are taken, as if all had been there."""
    kept = answers.of_groups(taken)
    advantages = group_advantages(rewards)[taken].flatten()
    past = None
    if beta:
        with torch.no_grad(), reference(model):
            past = token_logprobs(model, kept)
    loss = policy_gradient_loss(
        token_logprobs(model, kept),
        kept.logprobs,
        advantages,
        kept.mask,
        kind,
        clip,
        limit=limit,
        reference=past,
        beta=beta,
    )
    # The groups left out add nothing to the sum, but they count in what it is divided by.
    share = kept.mask.sum() / answers.mask.sum() if kind == "dapo" else taken.float().mean()
    (loss * share).backward()
    training = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(training, 1.0)
    optimizer.step()
    optimizer.zero_grad()
