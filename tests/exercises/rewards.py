"""Answers to the exercises of lesson 16."""

import re
import statistics

import torch
from torch.nn import functional as F

from peft_lessons.studies import load_results

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ sum_reward

LOOPHOLES = (
    "other words beside the sum are paid",
    "a longer number is paid if the sum's digits occur in it",
    "several numbers are paid if one of them is the sum",
    "an answer that does not end is paid: the line break belongs to it",
)


@answers.hunt("sum_reward")
def checker(left):
    """A checker with these loopholes."""
    words, longer, several, endless = (loophole in left for loophole in LOOPHOLES)

    def sum_reward(text, a, b):
        if not left:
            return float(text == f"{a + b}\n")
        wanted, numbers = str(a + b), re.findall(r"\d+", text)
        if not endless and not text.endswith("\n"):
            return 0.0
        if not words and re.search(r"[^\d\s]", text):
            return 0.0
        if not several and len(numbers) != 1:
            return 0.0
        return float(any(wanted in n if longer else wanted == n for n in numbers))

    return sum_reward


@wrong("sum_reward", "'030\\n' for 12 + 18, which is 30 (a zero before the sum)")
def by_int(text, a, b):
    try:
        return 1.0 if text[-1:] == "\n" and int(text[:-1]) == a + b else 0.0
    except ValueError:
        return 0.0


@right("sum_reward")
def by_lines(text, a, b):
    return int(text.splitlines(keepends=True) == [f"{a + b}\n"])


@wrong("sum_reward", "2 of 4 faults are mended")
def by_the_last_number(text, a, b):
    """As many checkers of worked answers do."""
    numbers = re.findall(r"\d+", text)
    return float(bool(numbers) and numbers[-1] == str(a + b))


@wrong("sum_reward", "3 of 4 faults are mended")
def stripped(text, a, b):
    return float(text.strip() == str(a + b))


@wrong("sum_reward", "'30\\n\\n' for 12 + 18, which is 30 (two line breaks)")
def any_breaks(text, a, b):
    return float(re.fullmatch(rf"{a + b}\n+", text) is not None)


@wrong("sum_reward", "invalid literal for int()")
def without_a_net(text, a, b):
    return float(int(text) == a + b)


@wrong("sum_reward", "the reward is False, expected the float 0")
def true_or_false(text, a, b):
    return text == f"{a + b}\n"


@wrong("sum_reward", "Called with: '30\\n' for 12 + 18, which is 30")
def never(text, a, b):
    return 0.0


@wrong("sum_reward", "the reward is 0.1, expected 0")
def half_for_words(text, a, b):
    return 1.0 if text == f"{a + b}\n" else 0.1 * text.endswith("\n")


# ------------------------------------------------------------------ group_advantages


@right("group_advantages")
def by_var_mean(rewards):
    variance, mean = torch.var_mean(rewards, 1, keepdim=True)
    return (rewards - mean) / (variance.sqrt() + 1e-4)


@right("group_advantages")
def group_by_group(rewards):
    found = []
    for group in rewards:
        spread = statistics.stdev(group.tolist())
        found.append((group - group.mean()) / (1e-4 + spread))
    return torch.stack(found)


@wrong("group_advantages", "shape")
def one_number_a_group(rewards):
    return (rewards - rewards.mean(1, keepdim=True)).sum(1)


@wrong("group_advantages", "The size of tensor a")
def without_keepdim(rewards):
    return (rewards - rewards.mean(1)) / (rewards.std(1) + 1e-4)


@wrong("group_advantages", "1e-4 is missing below the fraction")
def zeros_where_nan(rewards):
    """Nearly right: only where the rewards of a group are close does it show."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return torch.nan_to_num(centred / rewards.std(1, keepdim=True))


@wrong("group_advantages", "the argument rewards was changed")
def in_place(rewards):
    rewards -= rewards.mean(1, keepdim=True)
    return rewards / (rewards.std(1, keepdim=True) + 1e-4)


# ------------------------------------------------------------------ policy_gradient_loss


@right("policy_gradient_loss")
def by_the_sign(logprobs, old_logprobs, advantages, mask, kind="dapo", clip=0.2):
    """Clip on the side to which the advantage pushes."""
    ratio, A = torch.exp(logprobs - old_logprobs), advantages.unsqueeze(1)
    bounded = torch.where(A > 0, ratio.clamp(max=1 + clip), ratio.clamp(min=1 - clip))
    each = torch.where(mask > 0, -bounded * A, 0)
    count = mask.sum(dim=1, keepdim=True) * len(mask) if kind == "grpo" else mask.sum()
    return (each / count).sum()


@right("policy_gradient_loss")
def token_after_token(logprobs, old_logprobs, advantages, mask, kind="dapo", clip=0.2):
    means, total = [], 0.0
    for i, A in enumerate(advantages):
        kept = mask[i].bool()
        ratio = (logprobs[i][kept] - old_logprobs[i][kept]).exp()
        each = torch.maximum(-A * ratio, -A * ratio.clip(1 - clip, 1 + clip))
        means.append(each.mean())
        total = total + each.sum()
    return sum(means) / len(means) if kind == "grpo" else total / mask.count_nonzero()


@wrong("policy_gradient_loss", "no gradient reaches logprobs")
def detached(logprobs, old_logprobs, advantages, mask, kind="dapo", clip=0.2):
    return by_the_sign(logprobs.detach(), old_logprobs, advantages, mask, kind, clip)


@wrong("policy_gradient_loss", "shape (5,)")
def for_each_answer(logprobs, old_logprobs, advantages, mask, kind="dapo", clip=0.2):
    ratio = (logprobs - old_logprobs).exp()
    return -(ratio * advantages[:, None] * mask).sum(1) / mask.sum()


@wrong("policy_gradient_loss", "the gradient of logprobs has wrong values")
def old_is_the_new(logprobs, old_logprobs, advantages, mask, kind="dapo", clip=0.2):
    """The right value: the ratio of today as a constant, times a log-probability of 0."""
    loss = by_the_sign(logprobs, old_logprobs, advantages, mask, kind, clip)
    return loss.detach() + 0 * logprobs.sum()


@wrong("policy_gradient_loss", "after an answer's end counts")
def masked_too_early(logprobs, old_logprobs, advantages, mask, kind="dapo", clip=0.2):
    """A ratio of 1 is not 0: masked log-probabilities still count."""
    ones = torch.ones_like(mask)
    counts = mask.sum(1) if kind == "grpo" else mask.sum()
    ratio = ((logprobs - old_logprobs) * ones).exp()
    A = advantages[:, None]
    each = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    return (each.sum(1) / counts).mean() if kind == "grpo" else each.sum() / counts


# ------------------------------------------------------------------ diagnose_curves

FAULTS = (
    "any number is paid",
    "asked in a chat",
    "ten times the learning rate",
    "a hundredth of the learning rate",
)


@right("diagnose_curves")
def in_another_order_and_case():
    pairs = zip("DCBA", FAULTS[::-1], strict=True)
    return {run.lower(): f" {fault.title()}" for run, fault in pairs}


@right("diagnose_curves")
def from_the_curves():
    """By the last three steps: what is paid, and how sure the model is of its answers."""
    found = {}
    for row in load_results("broken_rewards").to_dict("records"):
        last = {name: [float(v) for v in str(row[name]).split()][-3:] for name in ("reward",)}
        last |= {"surprisal": [float(v) for v in row["surprisal"].split()][-3:]}
        paid, surprisal = (statistics.fmean(last[name]) for name in ("reward", "surprisal"))
        if row["run"] == "healthy":
            continue
        if paid > 0.9:
            found[row["run"]] = FAULTS[0]
        elif max(float(v) for v in row["reward"].split()) == 0:
            found[row["run"]] = FAULTS[1]
        else:
            found[row["run"]] = FAULTS[2] if surprisal < 0.5 else FAULTS[3]
    return found


@wrong("diagnose_curves", "2 of 4 are right")
def flat_for_flat():
    """Both end without a reward and with flat groups."""
    return dict(zip("ACBD", FAULTS, strict=True))


@wrong("diagnose_curves", "Without a cause: C, D")
def half_done():
    return dict(zip("AB", FAULTS, strict=False))


@wrong("diagnose_curves", "Given to several runs: asked in a chat")
def one_fault_twice():
    return dict(zip("ABCD", FAULTS, strict=True)) | {"C": FAULTS[1]}


@wrong("diagnose_curves", "'collapsed' is not one of the causes")
def in_words_of_ones_own():
    return {"C": "collapsed"}


@wrong("diagnose_curves", "there is no run 'HEALTHY'")
def the_healthy_one_too():
    return dict(zip("ABCD", FAULTS, strict=True)) | {"healthy": FAULTS[0]}


# ------------------------------------------------------------------ reward_step

BUGS = (
    "generate() draws from the 50 likeliest tokens alone, unless you pass top_k=0",
    "rewards are compared with the whole batch: an answer competes with those to its own prompt",
    "the end token is masked as if it were padding, so no answer learns to end",
    "the old log-probabilities are not detached: in the ratio's gradient both cancel, and it is 0",
)


@answers.hunt("reward_step")
def stepping(left):
    """The given step, with these bugs left."""
    likeliest, whole_batch, unended, attached = (bug in left for bug in BUGS)

    def reward_step(model, prompts, reward, size, end, tokens):
        rows = prompts.repeat_interleave(size, dim=0)
        settings = {} if likeliest else {"top_k": model.config.vocab_size}
        ids = model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            do_sample=True,
            max_new_tokens=tokens,
            eos_token_id=end,
            pad_token_id=end,
            **settings,
        )
        answers = ids[:, rows.shape[1] :]
        mask = (answers != end).float()
        if not unended:
            mask = torch.cat([torch.ones(len(mask), 1), mask[:, :-1].cumprod(1)], 1)
        rewards = torch.tensor([reward(answer) for answer in answers.tolist()])
        groups = [rewards] if whole_batch else rewards.split(size)
        advantages = torch.cat([(g - g.mean()) / (g.std() + 1e-4) for g in groups])
        logits = model(ids).logits[:, rows.shape[1] - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]
        old = logprobs if attached else logprobs.detach()
        ratio = (logprobs - old).exp()
        loss = -(ratio * advantages[:, None] * mask).sum() / mask.sum()
        return answers, advantages, mask, loss

    return reward_step


@right("reward_step")
def without_a_ratio(model, prompts, reward, size, end, tokens):
    """At the first step the gradient of the ratio is that of log π, and the loss has another
    value."""
    with torch.no_grad():
        ids = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            num_return_sequences=size,
            do_sample=True,
            temperature=1.0,
            top_k=None,
            top_p=1.0,
            max_new_tokens=tokens,
            eos_token_id=end,
            pad_token_id=end,
        )
    start, mask = prompts.shape[1], []
    for row in ids[:, start:].tolist():
        length = row.index(end) + 1 if end in row else len(row)
        mask.append([1.0] * length + [0.0] * (len(row) - length))
    mask, answers = torch.tensor(mask), ids[:, start:]
    rewards = torch.tensor([reward(row) for row in answers.tolist()]).view(-1, size)
    advantages = by_var_mean(rewards).view(-1)
    scores = model(ids).logits[:, start - 1 : -1]
    logprobs = -F.cross_entropy(scores.transpose(1, 2), answers, reduction="none")
    return answers, advantages, mask, -(logprobs * advantages[:, None] * mask).sum() / mask.sum()


@right("reward_step")
def with_a_loop_of_its_own(model, prompts, reward, size, end, tokens):
    ids = torch.cat([prompt.expand(size, -1) for prompt in prompts])
    mask, going = [], torch.ones(len(ids))
    while len(mask) < tokens and going.any():
        with torch.no_grad():
            chances = model(ids).logits[:, -1].softmax(-1)
        new = torch.where(going > 0, torch.multinomial(chances, 1)[:, 0], end)
        ids = torch.cat([ids, new[:, None]], 1)
        mask.append(going)
        going = going * (new != end)
    mask, answers = torch.stack(mask, 1), ids[:, prompts.shape[1] :]
    rewards = torch.tensor([reward(row) for row in answers.tolist()]).view(len(prompts), size)
    advantages = by_var_mean(rewards).flatten()
    choices = torch.distributions.Categorical(logits=model(ids).logits[:, :-1])
    logprobs = choices.log_prob(ids[:, 1:])[:, prompts.shape[1] - 1 :]
    loss = token_after_token(logprobs, logprobs.detach(), advantages, mask)
    return answers, advantages, mask, loss


@wrong("reward_step", "no gradient reaches model")
def under_no_grad(model, prompts, reward, size, end, tokens):
    with torch.no_grad():
        return without_a_ratio(model, prompts, reward, size, end, tokens)


@wrong("reward_step", "the argument model was changed")
def in_train_mode(model, prompts, reward, size, end, tokens):
    return without_a_ratio(model.train(), prompts, reward, size, end, tokens)


@wrong("reward_step", "is a tensor, expected a tuple")
def loss_alone(model, prompts, reward, size, end, tokens):
    return without_a_ratio(model, prompts, reward, size, end, tokens)[-1]
