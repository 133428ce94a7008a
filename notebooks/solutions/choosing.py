"""Solutions of lesson 13."""

import math
import statistics

from peft_lessons.studies import student_t


def fits(n_params: int, n_trainable: int, gpu_gb: float, bits: int) -> bool:
    """Return whether weights and what trains take at most seven eighths of a GPU."""
    stored = 16 if bits == 16 else 4 + 8 / 64 + 32 / (64 * 256)   # bits of a frozen weight
    frozen = (n_params - n_trainable) * stored / 8                # bytes
    return frozen + 16 * n_trainable <= 7 / 8 * gpu_gb * 2**30


def seeds_needed(
    pilot_a: list[float], pilot_b: list[float], margin: float, most: int
) -> int | None:
    """Return the fewest seeds whose interval of a − b ends below the margin, or None."""
    gaps = [a - b for a, b in zip(pilot_a, pilot_b, strict=True)]
    mean, spread = statistics.fmean(gaps), statistics.stdev(gaps)
    for n in range(2, most + 1):                      # t falls with n, so try one after another
        if mean + student_t(n - 1) * spread / math.sqrt(n) < margin:
            return n
    return None


def my_page() -> dict:
    """Return what I train, where and how, and the measurement that would change my mind."""
    return {
        "model": "Llama-3-8B", "gpu": 24, "tokens": 4096, "server": "vLLM",
        "method": "LoRA", "levers": ["checkpointing", "chunked loss"],
        "largest": "base", "learning rate": 2e-4,
        "rival": "DoRA", "margin": 1.0, "spread": 0.5, "seeds": 5,
    }


def defend_choice(
    needs: dict[str, float], gpu_gb: float, scores: dict[str, list[float]]
) -> dict:
    """Return the cheapest method that fits and is as good as the best, with the numbers."""

    def paired(a: list[float], b: list[float]) -> tuple[float, float, float]:
        gaps = [x - y for x, y in zip(a, b, strict=True)]
        mean, n = statistics.fmean(gaps), len(gaps)
        half = student_t(n - 1) * statistics.stdev(gaps) / math.sqrt(n)
        return mean, mean - half, mean + half

    usable = 7 / 8 * gpu_gb
    fitting = [name for name in needs if needs[name] <= usable]
    if not fitting:
        return {"method": "does not fit", "left": usable - min(needs.values()), "behind": {}}
    best = max(fitting, key=lambda name: statistics.fmean(scores[name]))
    behind = {name: paired(scores[best], scores[name]) for name in fitting if name != best}
    as_good = [best, *(name for name, (_, _, high) in behind.items() if high <= 1)]
    chosen = min(as_good, key=needs.get)
    return {"method": chosen, "left": usable - needs[chosen], "behind": behind}
