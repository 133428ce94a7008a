"""Answers to the exercises of lesson 01."""

import math

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ largest_batch


@wrong("largest_batch", "gradients and activations are added")
def of_the_sum(gpu_bytes, held, gradients, per_sentence):
    return max(0, int((gpu_bytes - held - gradients) // per_sentence))


@wrong("largest_batch", "where they do not fit, no batch does")
def activations_alone(gpu_bytes, held, gradients, per_sentence):
    batch = 0
    while held + (batch + 1) * per_sentence <= gpu_bytes:
        batch += 1
    return batch


@wrong("largest_batch", "the result is 0, expected 42")
def of_the_larger_part(gpu_bytes, held, gradients, per_sentence):
    # One sentence against all gradients: which is larger does not decide.
    return int((gpu_bytes - held) // per_sentence) if per_sentence > gradients else 0


@wrong("largest_batch", "`held` lies there during the whole step")
def an_empty_gpu(gpu_bytes, held, gradients, per_sentence):
    return int(gpu_bytes // per_sentence) if gradients <= gpu_bytes else 0


@wrong("largest_batch", "the batch is one sentence too large: round down")
def rounded_to_the_nearest(gpu_bytes, held, gradients, per_sentence):
    left = gpu_bytes - held
    return max(0, round(left / per_sentence)) if gradients <= left else 0


@right("largest_batch")
def both_high_points(gpu_bytes, held, gradients, per_sentence):
    fits = gpu_bytes >= held + gradients and gpu_bytes >= held + per_sentence
    return (gpu_bytes - held) // per_sentence if fits else 0


@right("largest_batch")
def by_doubling_and_halving(gpu_bytes, held, gradients, per_sentence):
    def peak(batch):
        return held + max(gradients, batch * per_sentence)

    high = 1
    while peak(high) <= gpu_bytes:
        high *= 2
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(middle) <= gpu_bytes else (low, middle)
    return low


# ------------------------------------------------------------------ training_bytes


@wrong("training_bytes", "Expected training_bytes(n_params, n_trainable, weight=2")
def no_defaults(n_params, n_trainable, weight, grad, master, moments):
    return int(n_params * weight + n_trainable * (grad + master + moments))


@wrong("training_bytes", "the result is 6,797,135,872, expected 13,535,551,488")
def wrong_default(n_params, n_trainable, weight=1, grad=2, master=4, moments=8):
    return int(n_params * weight + n_trainable * (grad + master + moments))


@right("training_bytes")
def by_groups(n_params, n_trainable, weight=2, grad=2, master=4, moments=8):
    groups = [(n_params - n_trainable, weight), (n_trainable, weight + grad + master + moments)]
    return int(sum(count * size for count, size in groups))


@right("training_bytes")
def rounded(n_params, n_trainable, weight=2, grad=2, master=4, moments=8):
    total = n_params * weight
    for state in (grad, master, moments):
        total += n_trainable * state
    return round(total)


@right("training_bytes")
def a_whole_float(n_params, n_trainable, weight=2, grad=2, master=4, moments=8):
    return float(weight) * n_params + (grad + master + moments) * n_trainable


# ------------------------------------------------------------------ step_flops


@right("step_flops")
def full_minus_saved(n_params, n_trainable, tokens):
    return 6 * n_params * tokens - 2 * (n_params - n_trainable) * tokens


@right("step_flops")
def nothing_for_nothing(n_params, n_trainable, tokens):
    # Without anything to train there is no backward pass: the exercise leaves this case open.
    return 2 * n_params * tokens + (2 * (n_params + n_trainable) * tokens if n_trainable else 0)


@right("step_flops")
def by_token(n_params, n_trainable, tokens):
    return sum([4 * n_params, 2 * n_trainable]) * tokens


@right("step_flops")
def arrows_of_frozen_and_trained(n_params, n_trainable, tokens):
    return 2.0 * tokens * (2 * (n_params - n_trainable) + 3 * n_trainable)


# ------------------------------------------------------------------ largest_rank


@right("largest_rank")
def whole_floats(shapes, budget_bytes, bytes_per_parameter):
    fits = budget_bytes // (float(bytes_per_parameter) * sum(map(sum, shapes)))
    return min(fits, min(map(min, shapes)))


@right("largest_rank")
def bisected(shapes, budget_bytes, bytes_per_parameter):
    low, high = 0, min(min(shape) for shape in shapes)
    while low < high:
        middle = (low + high + 1) // 2
        cost = sum(middle * (out + in_) for out, in_ in shapes) * bytes_per_parameter
        low, high = (middle, high) if cost <= budget_bytes else (low, middle - 1)
    return low


@right("largest_rank")
def by_parameters(shapes, budget_bytes, bytes_per_parameter):
    parameters = math.floor(budget_bytes / bytes_per_parameter)
    ranks = range(1, min(map(min, shapes)) + 1)
    return max([r for r in ranks if r * sum(map(sum, shapes)) <= parameters], default=0)


# ------------------------------------------------------------------ count_parameters


@answers.hunt("count_parameters")
def count_with(bugs):
    def count_parameters(model):
        named = model.named_parameters(
            remove_duplicate="the tied weight is counted twice" not in bugs
        )
        counted = [p for _, p in named]
        if "buffers are counted: they are not parameters" in bugs:
            counted += model.buffers()
        packed = not any("packed" in bug for bug in bugs)
        sizes = [
            (p.quant_state.shape if packed and hasattr(p, "quant_state") else p.shape).numel()
            for p in counted
        ]
        trains = [p.requires_grad for p in counted]
        return sum(sizes), sum(n for n, train in zip(sizes, trains, strict=True) if train)

    return count_parameters


@wrong("count_parameters", "0 of 3 faults are mended.\n  Here, total is 0, expected 58")
def placeholder(model):
    return 0, 0


@right("count_parameters")
def packed_doubled(model):
    def size(p):
        return p.numel() * (2 if hasattr(p, "quant_state") else 1)

    counts = [(size(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in counts), sum(n for n, trains in counts if trains)


@right("count_parameters")
def by_identity(model):
    seen, total, trainable = set(), 0, 0
    for name, p in model.state_dict(keep_vars=True).items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if id(p) in seen or name.rpartition(".")[2] in owner._buffers:
            continue
        seen.add(id(p))
        count = math.prod(p.quant_state.shape if hasattr(p, "quant_state") else p.shape)
        total, trainable = total + count, trainable + count * p.requires_grad
    return [total, trainable]
