"""Answers to the exercises of lesson 16."""

import torch

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ group_advantages


@right("group_advantages")
def by_var_mean(rewards):
    variance, mean = torch.var_mean(rewards, 1, keepdim=True)
    return (rewards - mean) / (variance.sqrt() + 1e-4)


@wrong("group_advantages", "shape")
def one_number_a_group(rewards):
    return (rewards - rewards.mean(1, keepdim=True)).sum(1)
