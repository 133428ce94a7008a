"""Checks of lesson 15."""

import copy
from collections.abc import Callable
from functools import cache
from itertools import combinations

import torch
from torch import nn
from torch.nn import functional as F

from ..data.base_models import load_tokenizer
from ..engine import inject
from ..methods.lora import LoRA
from ..testing.tiny import perturb, tiny_llama
from .kit import Case, check_for, refused
from .mistakes import mistakes

# ------------------------------------------------------------------ answer_labels


def _chat(length, asked, swapped=None):
    """Return the tokens of a chat and of its prompt; with `swapped`, one token of that differs."""
    ids = torch.randint(3, 400, (length,))
    prompt = ids[:asked].clone()
    if swapped is not None:
        prompt[swapped] += 1
    return [ids, prompt]


@check_for(
    cases=[
        Case(lambda: _chat(12, 7)),
        Case(lambda: _chat(30, 11)),
        Case(lambda: _chat(9, 2)),
        refused(lambda: _chat(14, 6, swapped=5), "prefix", "the last token of prompt differs"),
        refused(lambda: _chat(14, 6, swapped=2), "prefix", "a token inside of prompt differs"),
        refused(lambda: _chat(5, 5, swapped=0)[::-1], "prefix", "the first token differs"),
    ],
    returns="the labels",
    causes=mistakes(
        """
        def answer_labels(ids, prompt):
            n = len(prompt)
            if not torch.equal(ids[:n], prompt):
                raise ValueError("the prompt is no prefix of the chat")
            labels = ids.clone()
            labels[:n] = -100
            return labels
        """,
        """
        the labels are shifted by one position: the model shifts them by itself
            return labels → return F.pad(labels[1:], (0, 1), value=-100)
        the answer's first token is masked too
            labels[:n] = → labels[:n + 1] =
        the last token before the answer is a label
            labels[:n] = → labels[:n - 1] =
        the end token is masked, and the model never learns to stop
            return labels → labels[-1] = -100; return labels
        the whole chat is labelled: mask what comes before the answer
            labels[:n] = -100 → ∅
        the answer is masked, and the prompt is labelled
            labels[:n] = → labels[n:] =
        0 is a token like any other: the loss leaves out -100
            labels[:n] = -100 → labels[:n] = 0
        """,
    ),
)
def answer_labels(ids, prompt):
    """The answer and its end token are labels, nothing before them is, and a prompt that the chat
    does not begin with is refused."""
    if ids.tolist()[: len(prompt)] != prompt.tolist():
        raise ValueError("prompt must be a prefix of ids")
    return torch.tensor([-100] * len(prompt) + ids[len(prompt) :].tolist())


# ------------------------------------------------------------------ sequence_logprob


def _predicted(lengths, tokens, vocabulary, dtype=torch.float32):
    """Return logits, and labels that begin after prompts of these lengths."""
    labels = torch.randint(vocabulary, (len(lengths), tokens))
    for row, length in zip(labels, lengths, strict=True):
        row[:length] = -100
    return [3 * torch.randn(len(lengths), tokens, vocabulary, dtype=dtype), labels]


def _gaps():
    """Return labels with -100 among them, as padding or a chat of several answers leaves them."""
    logits, labels = _predicted((2, 4, 1), 10, 13)
    labels[0, 5:7], labels[1, -3:] = -100, -100
    return [logits, labels]


def _unlikely():
    logits, labels = _predicted((2, 1), 6, 8)
    logits[0, 3, labels[0, 4]] = -200
    return [logits, labels]


@check_for(
    cases=[
        Case(lambda: _predicted((3, 1, 5), 9, 11)),
        Case(_gaps, note="-100 also between and after the answers"),
        Case(lambda: _predicted((0, 2), 6, 17), note="a label at position 0"),
        Case(lambda: _predicted((4,), 7, 5, torch.float64), note="one sequence"),
        Case(_unlikely, note="a token of probability e^-200"),
    ],
    gradients=("logits",),
    causes=mistakes(
        """
        def sequence_logprob(logits, labels):
            predicted, targets = logits[:, :-1], labels[:, 1:]
            learned = targets != -100
            logprobs = predicted.log_softmax(-1)
            picked = logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
            return (picked * learned).sum(1)
        """,
        """
        the shift is missing: the logits at position t predict the label at t + 1
            logits[:, :-1], labels[:, 1:] → logits, labels
        the shift goes the wrong way: the logits at position t predict the label at t + 1
            logits[:, :-1], labels[:, 1:] → logits[:, 1:], labels[:, :-1]
        the first label of each answer is lost: mask the labels, not the tokens that predict them
            learned = targets != -100 → learned = (targets != -100) & (labels[:, :-1] != -100)
        this is the mean over the labels: return the sum
            .sum(1) → .sum(1) / learned.sum(1)
        this is the mean over all positions: return the sum
            .sum(1) → .mean(1)
        positions labelled -100 count as token 0: mask them
            * learned → ∅
        the logits are summed as they are: log_softmax turns them into log-probabilities
            .log_softmax(-1) → ∅
        the softmax runs over the positions: normalise over the vocabulary, the last dimension
            .log_softmax(-1) → .log_softmax(1)
        probabilities are summed: take their logarithm
            .log_softmax(-1) → .softmax(-1)
        the softmax rounds an unlikely token's probability to 0, and its logarithm is −∞:
        log_softmax computes both in one
            .log_softmax(-1) → .softmax(-1).log()
        this is the loss: the log-probability has the opposite sign
            return (picked → return -(picked
        """,
    ),
)
def sequence_logprob(logits, labels):
    """Each sum is the log-probability of all labels of the sequence, with its gradient."""
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return -losses.sum(1)


# ------------------------------------------------------------------ dpo_loss


def _sums(batch, beta, dtype=torch.float32):
    """Return log-probabilities of answers: far from 0, and the policy's near the reference's."""
    reference = -40 * torch.rand(2, batch, dtype=dtype) - 10
    change = 2 * torch.randn(2, batch, dtype=dtype)
    # At least 1: a small difference of large sums is rounded differently in each right answer.
    policy = reference + change + change.sign()
    return [*policy, *reference, beta]


def _far():
    """Return sums of which the first pair has a margin of -200."""
    *sums, _ = _sums(3, 0.5)
    sums[0][0], sums[1][0] = sums[2][0] - 220, sums[3][0] + 180
    return [*sums, 0.5]


def _scored(result):
    """Take gradients of the loss alone: rewards are only reported, detached or not."""
    loss, chosen, rejected = result
    rewards = {"reward_chosen": chosen.detach(), "reward_rejected": rejected.detach()}
    return {"the loss": loss, **rewards}


@check_for(
    cases=[
        Case(lambda: _sums(4, 0.1)),
        Case(lambda: _sums(3, 0.7, torch.float64)),
        Case(lambda: _sums(1, 0.3), note="one pair"),
        Case(_far, note="a margin of −200"),
    ],
    returns=("loss", "reward_chosen", "reward_rejected"),
    view=_scored,
    gradients=("policy_chosen", "policy_rejected"),
    causes=mistakes(
        """
        def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
            chosen = policy_chosen - reference_chosen
            rejected = policy_rejected - reference_rejected
            loss = -F.logsigmoid(beta * (chosen - rejected)).mean()
            return loss, beta * chosen, beta * rejected
        """,
        """
        beta is outside of the sigmoid: multiply the margin by it
            F.logsigmoid(beta * (chosen - rejected)) → beta * F.logsigmoid(chosen - rejected)
        beta is left out of the loss
            beta * (chosen → (chosen
        the sign is swapped: this loss prefers the rejected answer
            (chosen - rejected) → (rejected - chosen)
        the reference is left out
            policy_chosen - reference_chosen → policy_chosen
            policy_rejected - reference_rejected → policy_rejected
        the reference is added: the logarithm of a ratio is a difference
            policy_chosen - reference_chosen → policy_chosen + reference_chosen
            policy_rejected - reference_rejected → policy_rejected + reference_rejected
        the log-probabilities are divided: the logarithm of a ratio is a difference
            policy_chosen - reference_chosen → policy_chosen / reference_chosen
            policy_rejected - reference_rejected → policy_rejected / reference_rejected
        the loss lacks the reference: it does not cancel, since each answer has its own
            (chosen - rejected)) → (policy_chosen - policy_rejected))
        the losses of the pairs are summed: return their mean
            .mean() → .sum()
        the margins are averaged before the sigmoid: average the losses
            (chosen - rejected)).mean() → (chosen - rejected).mean())
        beta is left out of the rewards
            beta * chosen, beta * rejected → chosen, rejected
        the order is reversed: return reward_chosen first
            beta * chosen, beta * rejected → beta * rejected, beta * chosen
        the minus is missing: the loss is −log σ
            -F.logsigmoid → F.logsigmoid
        the logarithm is missing: the loss is −log σ
            -F.logsigmoid → -torch.sigmoid
        each reward has a sigmoid of its own: take one sigmoid of their difference
            F.logsigmoid(beta * (chosen - rejected)) →
                (F.logsigmoid(beta * chosen) - F.logsigmoid(beta * rejected))
        exp overflows at a margin of −200, and the loss is infinite: use F.logsigmoid
            F.logsigmoid(beta * (chosen - rejected)) →
                torch.log(torch.sigmoid(beta * (chosen - rejected)))
        """,
    ),
)
def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """The loss, its gradient, and both rewards, for a margin of −200 too."""
    chosen = beta * policy_chosen - beta * reference_chosen
    rejected = beta * policy_rejected - beta * reference_rejected
    return F.softplus(rejected - chosen).sum() / len(chosen), chosen, rejected


# ------------------------------------------------------------------ preference_step

# No newline after a message's end token, so that a whole chat ends with this token.
_TEMPLATE = """\
{%- for message in messages -%}
{{ '' if loop.first else '\n' }}<|im_start|>{{ message['role'] + '\n' + message['content'] -}}
<|im_end|>
{%- endfor -%}
{{ '\n<|im_start|>assistant\n' if add_generation_prompt else '' }}"""


@cache
def _speaker():
    """Return tinylm's tokenizer, taught ChatML."""
    tokenizer = copy.deepcopy(load_tokenizer("tinylm"))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # as the assistant has it
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


@cache
def _base() -> nn.Module:
    return tiny_llama(vocab_size=len(_speaker()), num_hidden_layers=1)


@cache
def _policy() -> nn.Module:
    """Return the base with a trained LoRA."""
    model = copy.deepcopy(_base())
    inject(model, LoRA(rank=4, alpha=6, targets=("q_proj", "v_proj", "down_proj")))
    return perturb(model)


def _pair(prompt, chosen, rejected, beta):
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    settings = _policy().config  # copying them takes longer than copying the model
    return [copy.deepcopy(_policy(), {id(settings): settings}), _speaker(), pair, beta]


_FAULTS = (
    "the end token is masked as if it were padding",
    "the prompt goes through the chat template twice",
    "the reference is computed with the adapter on",
    "log-probabilities are averaged: DPO takes their sum",
)


def _prompt(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def _step(*faults: str) -> Callable:
    """Make a preference_step with some of the faults. Its reference is the base itself."""
    masked, twice, adapted, mean = (fault in faults for fault in _FAULTS)

    def preference_step(model, tokenizer, pair, beta):
        prompt = _prompt(pair["prompt"])
        prompt = tokenizer(_prompt(prompt) if twice else prompt).input_ids

        def logprob(network, answer):
            ids = torch.tensor(prompt + tokenizer(f"{answer}<|im_end|>").input_ids)
            choices = torch.distributions.Categorical(logits=network(ids[None]).logits[0, :-1])
            each = choices.log_prob(ids[1:])[len(prompt) - 1 :]
            each = each[:-1] if masked else each
            return each.mean() if mean else each.sum()

        def margin(network):
            return logprob(network, pair["chosen"]) - logprob(network, pair["rejected"])

        with torch.no_grad():
            reference = margin(model if adapted else _base())
        return F.softplus(beta * (reference - margin(model)))

    return preference_step


_QUESTIONS = [
    ("What is a lantern?", "A lamp in a case.", "Well, let me think about that word.", 0.3),
    ("Name a colour.", "I would be very happy to name one: green.", "Green.", 0.1),
]


# With the adapter on in the reference the loss is log 2 whatever else is wrong: only the gradients
# tell the faults apart.
@check_for(
    cases=[Case(lambda question=question: _pair(*question)) for question in _QUESTIONS],
    causes={
        "; ".join(faults): _step(*faults)
        for n in (1, 2, 3, 4)
        for faults in combinations(_FAULTS, n)
    },
    bugs=_FAULTS,
    returns="the loss",
    gradients=("model",),
)
def preference_step(model, tokenizer, pair, beta):
    """The loss of a pair, and its gradients for the adapter alone."""
    return _step()(model, tokenizer, pair, beta)
