"""Answers to the exercises of lesson 01."""

import math

import torch

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ training_bytes


@wrong("training_bytes", "are counted for the frozen weights too")
def all_states(n_params, n_trainable, weight=2, grad=2, master=4, moments=8):
    return int(n_params * (weight + grad + master + moments))


@wrong("training_bytes", "the gradients are counted for the frozen weights too")
def all_gradients(n_params, n_trainable, weight=2, grad=2, master=4, moments=8):
    return int(n_params * (weight + grad) + n_trainable * (master + moments))


@wrong("training_bytes", "the frozen weights are missing")
def trainable_only(n_params, n_trainable, weight=2, grad=2, master=4, moments=8):
    return int(n_trainable * (weight + grad + master + moments))


@wrong("training_bytes", "has its weights counted twice")
def weights_twice(n_params, n_trainable, weight=2, grad=2, master=4, moments=8):
    return int(n_params * weight + n_trainable * (weight + grad + master + moments))


@wrong("training_bytes", "the weights of what trains are missing")
def frozen_weights_only(n_params, n_trainable, weight=2, grad=2, master=4, moments=8):
    return int((n_params - n_trainable) * weight + n_trainable * (grad + master + moments))


@wrong("training_bytes", "the master copy is left out")
def no_master(n_params, n_trainable, weight=2, grad=2, master=4, moments=8):
    return int(n_params * weight + n_trainable * (grad + moments))


@wrong("training_bytes", "`moments` is already both")
def moments_doubled(n_params, n_trainable, weight=2, grad=2, master=4, moments=8):
    return int(n_params * weight + n_trainable * (grad + master + 2 * moments))


@wrong("training_bytes", "the result is a float: bytes are whole")
def float_bytes(n_params, n_trainable, weight=2, grad=2, master=4, moments=8):
    return n_params * weight + n_trainable * (grad + master + moments)


@wrong("training_bytes", "the result is a float: bytes are whole")
def always_float(n_params, n_trainable, weight=2, grad=2, master=4, moments=8):
    return 1.0 * n_params * weight + n_trainable * (grad + master + moments)


@wrong("training_bytes", "Expected training_bytes(n_params, n_trainable, weight=2")
def no_defaults(n_params, n_trainable, weight, grad, master, moments):
    return int(n_params * weight + n_trainable * (grad + master + moments))


@wrong("training_bytes", "the result is 6,797,135,872, expected 13,535,551,488")
def wrong_default(n_params, n_trainable, weight=1, grad=2, master=4, moments=8):
    return int(n_params * weight + n_trainable * (grad + master + moments))


@wrong("training_bytes", "the master copy is counted for the frozen weights too")
def all_masters(n_params, n_trainable, weight=2, grad=2, master=4, moments=8):
    return int(n_params * (weight + master) + n_trainable * (grad + moments))


@wrong("training_bytes", "the defaults are counted: use the arguments")
def arguments_ignored(n_params, n_trainable, weight=2, grad=2, master=4, moments=8):
    return 16 * n_trainable + 2 * (n_params - n_trainable)


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


# ------------------------------------------------------------------ step_flops


@wrong("step_flops", "frozen weights need no weight gradients")
def six(n_params, n_trainable, tokens):
    return 6 * n_params * tokens


@wrong("step_flops", "the backward pass still goes through the frozen weights")
def cheap_backward(n_params, n_trainable, tokens):
    return 2 * n_params * tokens + 4 * n_trainable * tokens


@wrong("step_flops", "of the 6 for each weight that trains, 4 are in 4·N already")
def six_on_top(n_params, n_trainable, tokens):
    return 4 * n_params * tokens + 6 * n_trainable * tokens


@wrong("step_flops", "only what trains is counted")
def trained_only(n_params, n_trainable, tokens):
    return 6 * n_trainable * tokens


@wrong("step_flops", "the forward pass is left out")
def no_forward(n_params, n_trainable, tokens):
    return 2 * tokens * (n_params + n_trainable)


@wrong("step_flops", "the weight gradients are left out")
def no_weight_gradients(n_params, n_trainable, tokens):
    return 4 * n_params * tokens


@wrong("step_flops", "a multiply-add is two operations")
def multiply_adds(n_params, n_trainable, tokens):
    return (2 * n_params + n_trainable) * tokens


@wrong("step_flops", "this is for one token")
def one_token(n_params, n_trainable, tokens):
    return 4 * n_params + 2 * n_trainable


@wrong("step_flops", "the result is a float")
def float_flops(n_params, n_trainable, tokens):
    return 4.0 * n_params * tokens + 2 * n_trainable * tokens


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


# ------------------------------------------------------------------ largest_rank


@wrong("largest_rank", "out + in parameters a layer, not out · in")
def whole_matrices(shapes, budget_bytes, bytes_per_parameter):
    cost = sum(out * in_ for out, in_ in shapes) * bytes_per_parameter
    return min(int(budget_bytes // cost), min(map(min, shapes)))


@wrong("largest_rank", "only A is counted")
def a_only(shapes, budget_bytes, bytes_per_parameter):
    cost = sum(in_ for _, in_ in shapes) * bytes_per_parameter
    return min(int(budget_bytes // cost), min(map(min, shapes)))


@wrong("largest_rank", "only B is counted")
def b_only(shapes, budget_bytes, bytes_per_parameter):
    cost = sum(out for out, _ in shapes) * bytes_per_parameter
    return min(int(budget_bytes // cost), min(map(min, shapes)))


@wrong("largest_rank", "only the first layer is counted")
def first_layer(shapes, budget_bytes, bytes_per_parameter):
    fits = int(budget_bytes // (sum(shapes[0]) * bytes_per_parameter))
    return min(fits, min(shapes[0]))


@wrong("largest_rank", "the bytes of a parameter are left out")
def parameters_as_bytes(shapes, budget_bytes, bytes_per_parameter):
    return min(budget_bytes // sum(map(sum, shapes)), min(map(min, shapes)))


@wrong("largest_rank", "one too large for the budget")
def first_that_does_not_fit(shapes, budget_bytes, bytes_per_parameter):
    rank = 1
    while rank * sum(map(sum, shapes)) * bytes_per_parameter <= budget_bytes:
        rank += 1
    return rank


@wrong("largest_rank", "exactly the budget still fits")
def strictly_below(shapes, budget_bytes, bytes_per_parameter):
    rank = 0
    while (rank + 1) * sum(map(sum, shapes)) * bytes_per_parameter < budget_bytes:
        rank += 1
    return min(rank, min(map(min, shapes)))


@wrong("largest_rank", "no rank above the smallest min(out, in) is of use")
def unlimited(shapes, budget_bytes, bytes_per_parameter):
    return int(budget_bytes // (sum(map(sum, shapes)) * bytes_per_parameter))


@wrong("largest_rank", "the smallest side of all layers, not the largest")
def limited_by_the_largest(shapes, budget_bytes, bytes_per_parameter):
    fits = int(budget_bytes // (sum(map(sum, shapes)) * bytes_per_parameter))
    return min(fits, max(min(shape) for shape in shapes))


@wrong("largest_rank", "only the first layer limits the rank")
def limited_by_the_first(shapes, budget_bytes, bytes_per_parameter):
    fits = int(budget_bytes // (sum(map(sum, shapes)) * bytes_per_parameter))
    return min(fits, *shapes[0])


@wrong("largest_rank", "the budget is split evenly")
def split_evenly(shapes, budget_bytes, bytes_per_parameter):
    share = budget_bytes / len(shapes) / bytes_per_parameter
    return min(min(int(share // sum(shape)), *shape) for shape in shapes)


@wrong("largest_rank", "where not even rank 1 fits the answer is 0")
def at_least_one(shapes, budget_bytes, bytes_per_parameter):
    fits = int(budget_bytes // (sum(map(sum, shapes)) * bytes_per_parameter))
    return max(1, min(fits, min(map(min, shapes))))


@wrong("largest_rank", "the result is a float")
def float_rank(shapes, budget_bytes, bytes_per_parameter):
    fits = budget_bytes // (sum(map(sum, shapes)) * bytes_per_parameter)
    return float(min(fits, min(map(min, shapes))))


@wrong("largest_rank", "one too large for the budget")
def rounded_up(shapes, budget_bytes, bytes_per_parameter):
    fits = math.ceil(budget_bytes / (sum(map(sum, shapes)) * bytes_per_parameter))
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


def _true_size(p):
    return p.quant_state.shape.numel() if hasattr(p, "quant_state") else p.numel()


@wrong("count_parameters", "the tied weight is counted twice")
def as_shipped(model):
    total = trainable = 0
    for tensor in model.state_dict(keep_vars=True).values():
        total += tensor.numel()
        if tensor.requires_grad:
            trainable += tensor.numel()
    return total, trainable


@wrong("count_parameters", "the tied weight is counted twice")
def tied_twice(model):
    total = trainable = 0
    for module in model.modules():
        for p in module.parameters(recurse=False):
            total += _true_size(p)
            trainable += _true_size(p) * p.requires_grad
    return total, trainable


@wrong("count_parameters", "buffers are counted")
def with_buffers(model):
    total = sum(map(_true_size, model.parameters())) + sum(b.numel() for b in model.buffers())
    return total, sum(_true_size(p) for p in model.parameters() if p.requires_grad)


@wrong("count_parameters", "the packed weight is counted by its bytes")
def packed_as_half(model):
    total = sum(p.numel() for p in model.parameters())
    return total, sum(p.numel() for p in model.parameters() if p.requires_grad)


@wrong("count_parameters", "uint8 alone does not make a packed weight")
def every_uint8_doubled(model):
    counts = [(p.numel() << (p.dtype == torch.uint8), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in counts), sum(n for n, trains in counts if trains)


@wrong("count_parameters", "leaves half of the last byte empty")
def packed_doubled(model):
    def size(p):
        return p.numel() * (2 if hasattr(p, "quant_state") else 1)

    counts = [(size(p), p.requires_grad) for _, p in model.named_parameters()]
    return sum(n for n, _ in counts), sum(n for n, trains in counts if trains)


@wrong("count_parameters", "parameters of equal values are counted once")
def once_by_value(model):
    unique = []
    for p in model.parameters():
        if not any(torch.equal(p, other) for other in unique):
            unique.append(p)
    return sum(map(_true_size, unique)), sum(_true_size(p) for p in unique if p.requires_grad)


@wrong("count_parameters", "only what trains is in the total")
def trainable_twice(model):
    trainable = sum(_true_size(p) for p in model.parameters() if p.requires_grad)
    return trainable, trainable


@wrong("count_parameters", "what is frozen is counted as trainable")
def all_trainable(model):
    total = sum(map(_true_size, model.parameters()))
    return total, total


@wrong("count_parameters", "trainable and total have changed places")
def turned(model):
    total = sum(map(_true_size, model.parameters()))
    return sum(_true_size(p) for p in model.parameters() if p.requires_grad), total


@wrong("count_parameters", "judged by .grad, which is None before a backward pass")
def those_with_a_gradient(model):
    sizes = [(_true_size(p), p.grad is not None) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)


@wrong("count_parameters", "total is 0, expected 58")
def placeholder(model):
    return 0, 0


@right("count_parameters")
def by_storage(model):
    names = model.named_parameters(remove_duplicate=False)
    unique = {p.data_ptr(): (_true_size(p), p.requires_grad) for _, p in names}.values()
    return sum(n for n, _ in unique), sum(n for n, trains in unique if trains)


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
