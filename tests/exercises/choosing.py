"""Answers to the exercises of lesson 13."""

import statistics

import numpy as np
import torch
from transformers import Qwen3Config

from peft_lessons.costs.estimate import GIB, NF4_BITS
from peft_lessons.studies import student_t

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ fits


@wrong("fits", "is the float")
def what_is_left(n_params, n_trainable, gpu_gb, bits):
    frozen = 2 if bits == 16 else NF4_BITS / 8
    return 0.875 * gpu_gb * GIB - frozen * (n_params - n_trainable) - 16 * n_trainable


def guessed(trained=16, frozen=2, share=0.875):
    """A fits that is wrong in a way that no cause is about."""

    def fits(n_params, n_trainable, gpu_gb, bits):
        size = frozen if bits == 16 else NF4_BITS / 8
        need = (n_params - n_trainable) * size + trained * n_trainable
        return need <= share * gpu_gb * GIB

    return fits


# A cause must not be named because True and False agree by chance.
for wrongly in (guessed(trained=9), guessed(trained=20), guessed(frozen=4), guessed(share=0.9)):
    wrong("fits", "the result is")(wrongly)


@right("fits")
def in_parts_and_in_numpy(n_params, n_trainable, gpu_gb, bits):
    base = np.float64(n_params - n_trainable) * (NF4_BITS if bits == 4 else 16) / 8
    parts = [base, *(size * n_trainable for size in (2, 2, 4, 4, 4))]
    return sum(parts) / GIB <= gpu_gb - gpu_gb / 8


@right("fits")
def with_a_branch(n_params, n_trainable, gpu_gb, bits):
    if bits == 4:
        blocks = (n_params - n_trainable) / 64
        base = 32 * blocks + blocks + 4 * blocks / 256
    else:
        base = 2 * (n_params - n_trainable)
    return bool(base + 16 * n_trainable <= 7 * gpu_gb * 2**27)


# ------------------------------------------------------------------ seeds_needed


@wrong("seeds_needed", ", expected 30")
def by_a_formula(pilot_a, pilot_b, margin, most):
    """The formula of many seeds: n would have to be known for its t."""
    gaps = np.subtract(pilot_a, pilot_b)
    n = (student_t(len(gaps) - 1) * gaps.std(ddof=1) / (margin - gaps.mean())) ** 2
    return float(n) if n <= most and margin > gaps.mean() else None


@wrong("seeds_needed", "the result is None")
def with_the_pilot_s_root(pilot_a, pilot_b, margin, most):
    gaps = np.subtract(pilot_a, pilot_b)
    half = gaps.std(ddof=1) / len(gaps) ** 0.5
    tried = range(2, most + 1)
    return next((n for n in tried if gaps.mean() + student_t(n - 1) * half < margin), None)


@wrong("seeds_needed", "the result is 24, expected 30")
def of_two_samples(pilot_a, pilot_b, margin, most):
    """No cause is named, though two samples mix two mistakes that have one."""
    mean = np.mean(pilot_a) - np.mean(pilot_b)
    both = (np.var(pilot_a, ddof=1) + np.var(pilot_b, ddof=1)) ** 0.5
    tried = range(2, most + 1)
    return next((n for n in tried if mean + student_t(2 * n - 2) * both / n**0.5 < margin), None)


@wrong("seeds_needed", "the spread is the variance: take its root")
def by_the_variance(pilot_a, pilot_b, margin, most):
    gaps = np.subtract(pilot_a, pilot_b)
    tried = range(2, most + 1)
    return next(
        (n for n in tried if gaps.mean() + student_t(n - 1) * gaps.var(ddof=1) / n**0.5 < margin),
        None,
    )


@wrong("seeds_needed", "the lower end is compared with 0, as if a had to be ahead")
def until_significant(pilot_a, pilot_b, margin, most):
    gaps = np.subtract(pilot_a, pilot_b)
    for n in range(2, most + 1):
        if gaps.mean() - student_t(n - 1) * gaps.std(ddof=1) / n**0.5 > 0:
            return n
    return None


@wrong("seeds_needed", "the spread is divided by √(n − 1)")
def by_degrees_of_freedom(pilot_a, pilot_b, margin, most):
    gaps = np.subtract(pilot_a, pilot_b)
    for df in range(1, most):
        if gaps.mean() + student_t(df) * gaps.std(ddof=1) / df**0.5 < margin:
            return df + 1
    return None


@wrong("seeds_needed", "expected None")
def without_a_limit(pilot_a, pilot_b, margin, most):
    return with_arrays(pilot_a, pilot_b, margin, 10_000)


@wrong("seeds_needed", "is None: is a return statement missing?")
def printed(pilot_a, pilot_b, margin, most):
    with_arrays(pilot_a, pilot_b, margin, most)


@wrong("seeds_needed", "the result is a list of 2")
def with_its_end(pilot_a, pilot_b, margin, most):
    return [with_arrays(pilot_a, pilot_b, margin, most), margin]


@right("seeds_needed")
def with_arrays(pilot_a, pilot_b, margin, most):
    gaps = np.array(pilot_a) - np.array(pilot_b)
    n = np.arange(2, most + 1)
    t = np.array([student_t(int(k) - 1) for k in n])
    enough = n[gaps.mean() + t * gaps.std(ddof=1) / np.sqrt(n) < margin]
    return enough[0] if len(enough) else None


@right("seeds_needed")
def from_the_pilot_on(pilot_a, pilot_b, margin, most):
    """The runs of the pilot are there already."""
    d = torch.tensor(pilot_a, dtype=torch.float64) - torch.tensor(pilot_b, dtype=torch.float64)
    n = len(d)
    while n <= most and d.mean() + student_t(n - 1) * d.std() / n**0.5 >= margin:
        n += 1
    return n if n <= most else None


@right("seeds_needed")
def by_next(pilot_a, pilot_b, margin, most):
    gaps = [a - b for a, b in zip(pilot_a, pilot_b, strict=True)]
    room = margin - statistics.fmean(gaps)
    error = statistics.variance(gaps)
    if room <= 0:
        return None
    tried = range(2, most + 1)
    return next((float(n) for n in tried if student_t(n - 1) ** 2 * error / n < room**2), None)


# ------------------------------------------------------------------ my_page


def page(**changes):
    """Return a function of a page with other entries, an underscore for each space in a key."""
    entries = {
        "model": "Llama-3-8B", "gpu": 24, "tokens": 4096, "method": "LoRA",
        "levers": ["chunked loss", "checkpointing"], "largest": "base", "learning rate": 1e-4,
        "rival": "DoRA", "margin": 1, "spread": 0.5, "seeds": 5,
    }  # fmt: skip
    entries |= {key.replace("_", " "): value for key, value in changes.items()}

    def my_page():
        return {key: value for key, value in entries.items() if value is not None}

    return my_page


QWEN = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
QWEN |= {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151_936}
SMALL = {"model": "SmolLM3-3B", "gpu": 80, "method": "full fine-tuning", "rival": "LoRA"}
WIDE = SMALL | {"gpu": 160, "tokens": 32_768}  # 16 bytes a weight are level with the logits
LARGE = {"model": "Llama-3.3-70B", "gpu": 80, "tokens": 2048, "method": "QLoRA"}

# Without a name of their own, they have the one of what they answer.
for right_page in (
    page(),
    page(server="vLLM", date="today"),
    page(levers=("checkpointing",), gpu=32.0),
    page(levers=[], tokens=32_768, gpu=288, largest="blocks", rival="QLoRA"),
    page(levers="checkpointing", tokens=32_768, gpu=80, largest="logits"),
    page(method="(IA)³", rival="LoRA", learning_rate=0.01),
    page(**SMALL, largest="trainable", learning_rate=1e-5, seeds=torch.tensor(6).item()),
    page(**WIDE, levers="checkpointing", largest="trainable", learning_rate=1e-5),
    page(**LARGE, rival="LoRA", rival_model="Qwen3-32B"),
    page(model=Qwen3Config(**QWEN, tie_word_embeddings=True), gpu=8, seeds=np.int64(9)),
):
    right("my_page")(right_page)

for wrong_page, words in (
    (page(gpu=16), "it does not fit: LoRA needs 19.0 GB, and 15.5 GB are usable"),
    (page(levers=None), "the page lacks 'levers'"),
    (page(levers=[]), "it does not fit"),
    (page(levers={"checkpointing": True, "chunked loss": False}), "'levers' is a dict"),
    (page(seeds=[0, 1, 2, 3, 4]), "'seeds' is [0, 1, 2, 3, 4], expected a number above 0"),
    (page(levers=["4 bits"]), "there is no lever '4 bits'"),
    (page(method="QLoRA", rival="LoRA"), "with both levers LoRA would fit as well"),
    (page(method="QLoRA", gpu=40, levers=[]), "with both levers LoRA would fit as well, in 19.0"),
    (page(method="DoRA", rival="(IA)³"), "LoRA would fit, and is neither"),
    (page(method="lora"), "'method' is 'lora'"),
    (page(largest="logits"), "'logits' is not the largest component with these levers"),
    (page(largest="activations"), "The components are: base, trainable, blocks, logits"),
    (page(levers="checkpointing", tokens=32_768, gpu=80), "It takes 16.1 GB, another one 50.4 GB"),
    (page(learning_rate=2e-5), "a learning rate of 2e-05 is no start for LoRA"),
    (page(**SMALL, largest="trainable", learning_rate=2e-4), "no start for full fine-tuning"),
    (page(rival="LoRA"), "the rival is your method itself"),
    (page(rival="full fine-tuning"), "full fine-tuning needs 130.8 GB and does not fit"),
    (page(**LARGE, rival="LoRA"), "let a smaller model be the 'rival model'"),
    (page(seeds=3), "with 3 seeds the interval reaches 1.24 points to either side"),
    (page(spread=2), "with 5 seeds the interval reaches 2.48 points"),
    (page(seeds=1), "one difference has no spread"),
    (page(seeds=4.5), "expected a whole number"),
    (page(margin="a point"), "'margin' is 'a point', expected a number above 0"),
    (page(tokens=0), "'tokens' is 0, expected a number above 0"),
    (page(model="gpt2"), "must be one of 'SmolLM3-3B'"),
    (page, "the result is a function, expected a dict"),
):
    wrong("my_page", words)(wrong_page)


# ------------------------------------------------------------------ defend_choice


def with_torch_and_a_table(scores_a, scores_b):
    d = torch.tensor(scores_a).double() - torch.tensor(scores_b).double()
    t = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)[len(d) - 2]
    half = (t * d.std() / d.numel() ** 0.5).item()
    return d.mean().item(), d.mean().item() - half, d.mean().item() + half


def in_a_loop(scores_a, scores_b):
    n = len(scores_a)
    total = squares = 0.0
    for i in range(n):
        gap = scores_a[i] - scores_b[i]
        total, squares = total + gap, squares + gap * gap
    variance = max(0.0, squares - total * total / n) / (n - 1)
    half = student_t(n - 1) * (variance / n) ** 0.5
    return [total / n, total / n - half, total / n + half]


@wrong("defend_choice", "Is each interval (mean, lower end, upper end) of best − method")
def rounded_intervals(needs, gpu_gb, scores):
    answer = with_a_sweep(needs, gpu_gb, scores)
    behind = {n: [round(v, 1) for v in interval] for n, interval in answer["behind"].items()}
    return answer | {"behind": behind}


@wrong("defend_choice", "(nothing fits)")
def without_a_case_for_nothing(needs, gpu_gb, scores):
    max(name for name in needs if needs[name] <= 0.875 * gpu_gb)
    return with_a_sweep(needs, gpu_gb, scores)


@right("defend_choice")
def intervals_as_arrays(needs, gpu_gb, scores):
    answer = with_a_sweep(needs, gpu_gb, scores)
    return answer | {"behind": {n: np.array(v) for n, v in answer["behind"].items()}}


@wrong("defend_choice", "the keys of the answer differ: missing 'behind'")
def undefended(needs, gpu_gb, scores):
    answer = with_a_sweep(needs, gpu_gb, scores)
    del answer["behind"]
    return answer


@right("defend_choice")
def with_a_sweep(needs, gpu_gb, scores):
    room = 0.875 * gpu_gb
    names = [n for n in sorted(needs, key=needs.get) if needs[n] <= room]
    if not names:
        return {"method": "does not fit", "left": room - min(needs.values()), "behind": {}}
    best = names[0]
    for name in names[1:]:
        if statistics.mean(scores[name]) > statistics.mean(scores[best]):
            best = name
    behind = {}
    for name in names:
        if name != best:
            behind[name] = in_a_loop(scores[best], scores[name])
    for name in names:
        if name == best or not behind[name][2] > 1:
            break
    return {"behind": behind, "left": room - needs[name], "method": name}


@right("defend_choice")
def with_torch(needs, gpu_gb, scores):
    need = torch.tensor(list(needs.values()), dtype=torch.float64)
    usable = gpu_gb * 7 / 8
    fit = need <= usable
    if not fit.any():
        return dict(method="does not fit", left=usable - need.min().item(), behind={})
    names = list(needs)
    mean = torch.tensor([np.mean(scores[n]) for n in names]).where(fit, -torch.inf)
    best = names[int(mean.argmax())]
    behind = {
        n: with_torch_and_a_table(scores[best], scores[n])
        for n, one in zip(names, fit, strict=True)
        if one and n != best
    }
    good = [n == best or (n in behind and behind[n][2] <= 1) for n in names]
    i = int(need.where(torch.tensor(good), torch.inf).argmin())
    return {"method": names[i], "left": usable - need[i].item(), "behind": behind}
