"""Answers to the exercises of lesson 01."""

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ training_bytes


@wrong("training_bytes", "Expected training_bytes(n_params, n_trainable, weight=2")
def no_defaults(n_params, n_trainable, weight, grad, master, moments):
    return int(n_params * weight + n_trainable * (grad + master + moments))


@wrong("training_bytes", "the result is 6,797,135,872, expected 13,535,551,488")
def wrong_default(n_params, n_trainable, weight=1, grad=2, master=4, moments=8):
    return int(n_params * weight + n_trainable * (grad + master + moments))


@right("training_bytes")
def a_whole_float(n_params, n_trainable, weight=2, grad=2, master=4, moments=8):
    return float(weight) * n_params + (grad + master + moments) * n_trainable


# ------------------------------------------------------------------ step_flops


@right("step_flops")
def nothing_for_nothing(n_params, n_trainable, tokens):
    # Without anything to train there is no backward pass: the exercise leaves this case open.
    return 2 * n_params * tokens + (2 * (n_params + n_trainable) * tokens if n_trainable else 0)


@right("step_flops")
def arrows_of_frozen_and_trained(n_params, n_trainable, tokens):
    return 2.0 * tokens * (2 * (n_params - n_trainable) + 3 * n_trainable)


# ------------------------------------------------------------------ largest_rank


@right("largest_rank")
def whole_floats(shapes, budget_bytes, bytes_per_parameter):
    fits = budget_bytes // (float(bytes_per_parameter) * sum(map(sum, shapes)))
    return min(fits, min(map(min, shapes)))


# ------------------------------------------------------------------ count_parameters


@wrong("count_parameters", "total is 0, expected 58")
def placeholder(model):
    return 0, 0


@right("count_parameters")
def packed_doubled(model):
    def size(p):
        return p.numel() * (2 if hasattr(p, "quant_state") else 1)

    counts = [(size(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in counts), sum(n for n, trains in counts if trains)
