"""Labels, log-probabilities and DPO's loss, compared with transformers and the paper's formula."""

import math

import pytest
import torch
from tiny import chat_tokenizer, close, tiny_llama

from peft_lessons import load_model
from peft_lessons.methods.assistant import (
    answer_labels,
    dpo_loss,
    group_advantages,
    keeps_rule,
    sequence_logprob,
)
from peft_lessons.train.generate import answer_questions


def test_only_the_answer_is_labelled():
    ids = torch.arange(5, 11)
    labels = answer_labels(ids, 4)
    assert labels.tolist() == [-100, -100, -100, -100, 9, 10]
    assert ids.tolist() == [5, 6, 7, 8, 9, 10]


def test_log_probabilities_are_those_of_the_models_loss():
    """The model's loss is their mean over all labels, with the sign turned."""
    model, ids = tiny_llama(), torch.arange(3, 25).reshape(2, 11)
    labels = torch.stack(
        [answer_labels(row, start) for row, start in zip(ids, (4, 7), strict=True)]
    )
    found = sequence_logprob(model(ids).logits, labels)
    assert found.shape == (2,)
    close(-found.sum() / (7 + 4), model(ids, labels=labels).loss)


def test_the_first_label_does_not_count():
    logits, labels = torch.randn(1, 4, 6), torch.tensor([[2, -100, 3, -100]])
    close(sequence_logprob(logits, labels), logits[:, 1].log_softmax(-1)[:, 3])


def test_dpo_starts_at_log_2_and_falls_as_the_margin_grows():
    same = torch.tensor([-9.0, -4.0])
    loss, *rewards = dpo_loss(same, same, same, same, 0.1)
    assert loss.item() == pytest.approx(math.log(2))
    assert all(torch.equal(reward, torch.zeros(2)) for reward in rewards)
    better, chosen, rejected = dpo_loss(same + 3, same - 2, same, same, 0.1)
    assert better.item() == pytest.approx(math.log(1 + math.exp(-0.5)))
    close(torch.stack([chosen, rejected]), torch.tensor([[0.3, 0.3], [-0.2, -0.2]]))


@pytest.mark.parametrize(
    ("text", "ended", "kept"),
    [
        ("A lantern is a lamp that you can carry.", True, True),
        ("A lantern is a lamp that you can carry.", False, False),
        ("A lantern is a lamp that you can carry", True, False),
        ("A lantern is a lamp. You can carry it.", True, False),
        ("A lamp.", True, False),
        ("word " * 25 + "more.", True, False),
        ("word " * 24 + "more.", True, True),
        ("", True, False),
    ],
)
def test_the_rule_is_one_sentence_that_ends(text, ended, kept):
    assert keeps_rule(text, ended) is kept


def test_advantages_compare_within_a_group():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    wanted = torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(group_advantages(rewards), wanted)


def test_questions_are_answered_together_as_each_alone():
    model, tokenizer = load_model("tinylm"), chat_tokenizer()
    questions = ["What is a lantern?", "Why?", "Who wrote this long and winding question?"]
    together = answer_questions(model, tokenizer, questions, tokens=6)
    alone = [answer_questions(model, tokenizer, [q], tokens=6)[0] for q in questions]
    assert together == alone == answer_questions(model, tokenizer, questions, tokens=6, size=2)
    torch.manual_seed(0)
    sampled = answer_questions(model, tokenizer, questions, tokens=6, temperature=1.5)
    assert sampled != together
    with pytest.raises(ValueError, match="no chat template"):
        answer_questions(model, chat_tokenizer(template=None), questions)
