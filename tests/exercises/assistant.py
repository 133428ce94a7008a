"""Answers to the exercises of lesson 15."""

import copy

import torch
from torch.nn import functional as F

from peft_lessons import disabled, unload
from peft_lessons.train.preferences import answer_logprob, preference_loss

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ answer_labels


def labelled(ids, start):
    return torch.where(torch.arange(len(ids)) < start, -100, ids)


@right("answer_labels")
def by_position(ids, prompt):
    if (ids[: len(prompt)] != prompt).any():
        raise ValueError("prompt is no prefix of ids")
    return labelled(ids, len(prompt))


@right("answer_labels")
def joined(ids, prompt):
    start, rest = ids.split([len(prompt), len(ids) - len(prompt)])
    if start.tolist() != prompt.tolist():
        raise ValueError(f"not a prefix: {prompt.tolist()}")
    return torch.cat([torch.full_like(prompt, -100), rest])


@wrong("answer_labels", "shape")
def answer_alone(ids, prompt):
    return ids[len(prompt) :]


@wrong("answer_labels", "nothing was raised, where ValueError was expected")
def by_the_length(ids, prompt):
    """Trust that the chat begins with the prompt."""
    return labelled(ids, len(prompt))


@wrong("answer_labels", "your function raised AssertionError")
def asserts(ids, prompt):
    assert torch.equal(ids[: len(prompt)], prompt), "no prefix"
    return labelled(ids, len(prompt))


# ------------------------------------------------------------------ sequence_logprob


@right("sequence_logprob")
def by_cross_entropy(logits, labels):
    pairs = zip(logits[:, :-1], labels[:, 1:], strict=True)
    return torch.stack([-F.cross_entropy(a, b, reduction="sum") for a, b in pairs])


@right("sequence_logprob")
def token_by_token(logits, labels):
    sums = []
    for row, tokens in zip(logits, labels.tolist(), strict=True):
        sums.append(row.new_zeros(()))
        for scores, token in zip(row, tokens[1:], strict=False):
            if token != -100:
                sums[-1] = sums[-1] + scores[token] - scores.logsumexp(0)
    return torch.stack(sums)


@wrong("sequence_logprob", "shape (), expected (3,)")
def over_the_batch(logits, labels):
    return by_cross_entropy(logits, labels).sum()


# ------------------------------------------------------------------ dpo_loss


@right("dpo_loss")
def by_softplus(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    policy, reference = policy_chosen - policy_rejected, reference_chosen - reference_rejected
    with torch.no_grad():
        rewards = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    return F.softplus(beta * (reference - policy)).mean(), beta * rewards[0], beta * rewards[1]


@right("dpo_loss")
def by_cross_entropy_of_two(
    policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta
):
    """The chosen answer is the right class of two."""
    policy = torch.stack([policy_chosen, policy_rejected], dim=1)
    reference = torch.stack([reference_chosen, reference_rejected], dim=1)
    rewards = beta * (policy - reference)
    first = torch.zeros(len(rewards), dtype=torch.long)
    return F.cross_entropy(rewards, first), *rewards.unbind(1)


# ------------------------------------------------------------------ preference_step


def prompt_of(tokenizer, question):
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def compared(policy, reference, beta):
    """The loss of two functions, each from an answer's name to its log-probability."""
    sums = policy("chosen"), policy("rejected")
    with torch.no_grad():
        fixed = reference("chosen"), reference("rejected")
    return preference_loss(torch.stack(sums).flatten(), torch.stack(fixed).flatten(), beta)[0]


def by_whole_chats(model, tokenizer, pair, policy, reference, beta):
    """Render question and answer in one chat."""
    chat = [{"role": "user", "content": pair["prompt"]}]
    start = len(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])

    def logprob(network):
        def of(which):
            whole = [*chat, {"role": "assistant", "content": pair[which]}]
            tokens = tokenizer.apply_chat_template(whole, return_tensors="pt", return_dict=True)
            labels = labelled(tokens["input_ids"][0], start)[None]
            return answer_logprob(network, {**tokens, "labels": labels})

        return of

    return compared(logprob(policy), logprob(reference), beta)


@right("preference_step")
def by_a_base_of_its_own(model, tokenizer, pair, beta):
    base = unload(copy.deepcopy(model))
    return by_whole_chats(model, tokenizer, pair, model, base, beta)


@right("preference_step")
def the_prompt_cancels(model, tokenizer, pair, beta):
    """Where log-probabilities are summed, the prompt's are the same in both answers."""
    prompt = prompt_of(tokenizer, pair["prompt"])

    def logprob(which):
        text = prompt + pair[which] + tokenizer.eos_token
        ids = tokenizer(text, return_tensors="pt").input_ids
        return answer_logprob(model, {"input_ids": ids, "labels": ids})

    def reference(which):
        with disabled(model):
            return logprob(which)

    return compared(logprob, reference, beta)


@right("preference_step")
def one_padded_batch(model, tokenizer, pair, beta):
    prompt = tokenizer(prompt_of(tokenizer, pair["prompt"])).input_ids
    texts = [pair["chosen"], pair["rejected"]]
    rows = [prompt + tokenizer(text + tokenizer.eos_token).input_ids for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : len(prompt)] = -100

    def logprobs():
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return answer_logprob(model, batch)

    policy = logprobs()
    with disabled(model):
        margin = policy - logprobs().detach()
    return F.softplus(beta * (margin[1] - margin[0]))


@right("preference_step")
def through_the_models_loss(model, tokenizer, pair, beta):
    """The model's loss is a mean: times the number of labels it is the sum."""
    prompt = tokenizer(prompt_of(tokenizer, pair["prompt"])).input_ids

    def logprob(which):
        answer = tokenizer(pair[which] + tokenizer.eos_token).input_ids
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        return -model(ids, labels=labels).loss * len(answer)

    def reference(which):
        with disabled(model):
            return logprob(which)

    return compared(logprob, reference, beta)
