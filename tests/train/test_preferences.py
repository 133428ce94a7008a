"""Labels, log-probabilities and DPO's loss, compared with transformers and the paper's formula."""

import math

import pytest
import torch
from tiny import chat_tokenizer, close, tiny_llama

from peft_lessons import load_model
from peft_lessons.train.generate import answer_questions, keeps_rule
from peft_lessons.train.preferences import answer_logprob, preference_loss


def test_log_probabilities_are_those_of_the_models_loss():
    """The model's loss is their mean over all labels, with the sign turned."""
    model, ids = tiny_llama(), torch.arange(3, 25).reshape(2, 11)
    labels = ids.clone()
    labels[0, :4] = labels[1, :7] = -100
    found = answer_logprob(model, {"input_ids": ids, "labels": labels})
    assert found.shape == (2,)
    close(-found.sum() / (7 + 4), model(ids, labels=labels).loss)


def test_the_first_label_does_not_count_and_padding_changes_nothing():
    model, ids = tiny_llama(), torch.tensor([[5, 9, 4, 8]])
    labels = torch.tensor([[5, -100, 4, -100]])
    wanted = model(ids).logits[:, 1].log_softmax(-1)[:, 4]
    close(answer_logprob(model, {"input_ids": ids, "labels": labels}), wanted)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    padded = {"input_ids": torch.cat([ids[:, :2], ids], 1), "attention_mask": mask}
    padded["labels"] = torch.cat([torch.full((1, 2), -100), labels], 1)
    padded["labels"][:, 2] = -100  # here the padding would predict it
    close(answer_logprob(model, padded), wanted)


def test_dpo_starts_at_log_2_and_falls_as_the_margin_grows():
    same = torch.tensor([-9.0, -4.0, -7.0, -3.0])
    loss, rewards = preference_loss(same, same, 0.1)
    assert loss.item() == pytest.approx(math.log(2)) and torch.equal(rewards, torch.zeros(4))
    change = torch.tensor([3.0, 3.0, -2.0, -2.0])
    better, rewards = preference_loss(same + change, same, 0.1)
    assert better.item() == pytest.approx(math.log(1 + math.exp(-0.5)))
    close(rewards, 0.1 * change)


@pytest.mark.parametrize(
    ("text", "ended", "kept"),
    [
        ("A lantern is a lamp that you can carry.", True, True),
        ("A lantern is a lamp that you can carry.", False, False),
        ("A lantern is a lamp that you can carry", True, False),
        ("A lantern is a lamp. You can carry it.", True, False),
        ("A lantern is a lamp. You", True, False),
        ("A lantern is a lamp.", True, True),
        ("A lantern gives light.", True, False),
        ("word " * 25 + "more.", True, False),
        ("word " * 24 + "more.", True, True),
        ("", True, False),
    ],
)
def test_the_rule_is_one_sentence_that_ends(text, ended, kept):
    assert keeps_rule(text, ended) is kept


def test_questions_are_answered_together_as_each_alone():
    model, tokenizer = load_model("tinylm"), chat_tokenizer()
    questions = ["What is a lantern?", "Why?", "Who wrote this long and winding question?"]
    together = answer_questions(model, tokenizer, questions, tokens=6)
    alone = [answer_questions(model, tokenizer, [q], tokens=6)[0] for q in questions]
    assert together == alone == answer_questions(model, tokenizer, questions, tokens=6, size=2)
    longer = answer_questions(model, tokenizer, questions, tokens=12)
    assert [end for _, end in together] == [a == b for a, b in zip(together, longer, strict=True)]
    assert not all(end for _, end in together)  # the questions hold the end token, too
    torch.manual_seed(0)
    sampled = answer_questions(model, tokenizer, questions, tokens=6, temperature=1.5)
    assert sampled != together
    with pytest.raises(ValueError, match="no chat template"):
        answer_questions(model, chat_tokenizer(template=None), questions)
