"""Run a mutation test: apply one-line faults to a copy of the course, and see what detects each.

    python -m tools.mutants [WORD ...]     WORD: only faults whose file or code contains a word

A fault has a line of the package or the tools, its replacement, and the test files that must detect
the fault. The checkout itself does not change. The exit status is the number of undetected faults.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.environment import ROOT, offline_environment

COPIED = ("peft_lessons", "classroom", "tests", "tools", "pyproject.toml")


@dataclass(frozen=True)
class Mutant:
    """Replace `old`, which occurs once in `file`, by `new`; one of `tests` must then fail."""

    file: str
    old: str
    new: str
    tests: str

    def __str__(self) -> str:
        sides = (" ".join(text.split())[:60] for text in (self.old, self.new))
        return f"{self.file}: {' → '.join(sides)}"


PLACES = ("tests/*/test_*.py", "classroom/tests/test_*.py")
TESTS = {path.stem: path for place in PLACES for path in ROOT.glob(place)}


def read(table: str) -> list[Mutant]:
    """Return the mutants of a table: a file and its tests, without "test_", then its faults."""
    mutants, file, tests = [], "", ""
    for line in table.strip().splitlines():
        if line.startswith("    "):
            old, new = line.strip().split(" → ")
            mutants.append(Mutant(file, old, new, tests))
        else:
            file, _, names = line.partition(": ")
            paths = [TESTS[f"test_{name}"].relative_to(ROOT) for name in names.split()]
            tests = " ".join(map(str, paths))
    return mutants


MUTANTS = read("""
peft_lessons/methods/lora.py: lora every_method injection
    alpha / math.sqrt(rank) if rslora else alpha / rank → alpha / rank
    F.linear(low, self.lora_B) * self.scaling → F.linear(low, self.lora_B)
    torch.zeros(out_features, rank) → torch.randn(out_features, rank)
    self.dropout(x.to(self.lora_A.dtype)) → x.to(self.lora_A.dtype)
    (y + self.lora(x)).to(y.dtype) → y + self.lora(x)
peft_lessons/methods/qlora.py: qlora
    (codes[0::2] << 4) | codes[1::2] → (codes[1::2] << 4) | codes[0::2]
    offset = absmax.mean() → offset = absmax.median()
    grad @ ctx.layer.weight.to(grad.dtype) → grad @ ctx.layer.weight.to(grad.dtype).sign()
    branch = not self.merged and self.lora is not None → branch = self.lora is not None
peft_lessons/methods/dora.py: dora
    @torch.no_grad()  # a constant in → # a constant in
    self.base.weight / self.merged_c[:, None] - → self.base.weight -
    plain = y if bias is None else y - bias → plain = y
    if self.training and self.dropout.p > 0: → if False:
    None if self.training else self.norms → self.norms
peft_lessons/methods/adalora.py: adalora
    self.alpha, self.divisor = alpha, rank + 1e-5 → self.alpha, self.divisor = alpha, rank
    (step > method.tinit and step % method.delta == 0) → (step % method.delta == 0)
    b: tensors[b][:, mask] → b: tensors[b]
    doubt = (importance - sensitivity).abs() → doubt = importance - sensitivity
peft_lessons/methods/adapters.py: adapters
    t = norm(h + x) → t = norm(h)
    h + self.scale * self.adapter(t) → h + self.adapter(t)
    self.added_to(h, x, output.LayerNorm) + x → self.added_to(h, x, output.LayerNorm)
peft_lessons/methods/ia3.py: ia3
    weight * self.l, None if keeps else → weight * self.l, None if 1 else
    self.base(rescaled(x, self.l.flatten())) → rescaled(self.base(x), self.l.flatten())
    entries["target_modules"] = paths → pass
peft_lessons/methods/prompt.py: prompt
    lengthen(labels, len(self.prompt_embeddings), -100) → labels
    inputs["position_ids"] = positions + p → pass
    torch.cat([own, positions], -1) → torch.cat([own + 1, positions], -1)
    places.where(places < 0, places + p) → places + p
peft_lessons/methods/prefix.py: prefix
    lengthen(mask, p, 1) → lengthen(mask, p, 0)
    changed["position_ids"] = positions + p → changed["position_ids"] = positions
    if not cache.get_seq_length(): → if True:
peft_lessons/methods/selective.py: selective
    endswith((".bias", "_bias")) → endswith(".bias")
    ((2 * s - 1) * stretch).clamp(0, 1) → ((2 * s - 1) * stretch).clamp(min=0)
    layer.w.copy_(layer.delta_weight() * mask) → layer.w.copy_(layer.w * mask)
peft_lessons/methods/unified.py: unified
    if model is changed and isinstance(prefix → if isinstance(prefix
peft_lessons/methods/variants.py: variants
    "lora.lora_B": self.lr_ratio → "lora.lora_A": self.lr_ratio
    torch.cat([B, -B0], dim=1) → torch.cat([B, B0], dim=1)
    return S - S.mT → return S + S.mT
peft_lessons/train/preferences.py: preferences
    .logits[:, :-1], batch → .logits[:, 1:], batch
    chosen - rejected → rejected - chosen
peft_lessons/train/rewards.py: rewards
    divergence * ratio if weighted_kl → divergence
    kept.mask.sum() / answers.mask.sum() → 1.0
    cache.batch_select_indices(going) → pass
    ratio.clamp(1 - clip, 1 + clip) → ratio
peft_lessons/engine/injection.py: frozen_heads
    flat[:: max(1, flat.numel() // 64)] → flat[:64]
peft_lessons/engine/injection.py: injection every_method
    share = 100 * self.trainable / self.base → share = 100 * self.trainable / self.total
    if name in old and not injection.merged: → if name in old:
    module.training = layer.training → pass
    p.data.to(trained_dtype(p.dtype)) → p.data
    wrapper.new_tensors(merged) → pass
peft_lessons/train/generate.py: preferences
    (new == tokenizer.eos_token_id).any(dim=1) → (rows == tokenizer.eos_token_id).any(dim=1)
peft_lessons/engine/targets.py: injection every_method
    path == name or path.endswith("." + name) → path.endswith(name)
    m in model.named_modules(remove_duplicate=False) → m in model.named_modules()
peft_lessons/engine/layer.py: injection every_method
    if not stored.isfinite().all(): → if not tensor.isfinite().all():
peft_lessons/engine/atomic.py: atomic
    with open(parts[path], "wb") as file: → with open(path, "wb") as file:
    os.replace(old[path], path) if path in old else path.unlink() → pass
    parts[path].chmod(path.stat().st_mode | stat.S_IWRITE) → pass
peft_lessons/engine/files.py: files
    if "meta" not in (digest, *digests) and digest not in digests: → if False:
    if surplus := sorted(tensors.keys() - expected.keys()): → if surplus := []:
    if not trainable: → if False:
    tensors[key].to(slot.dtype)} → tensors[key]}
peft_lessons/train/loop.py: loop
    torch.manual_seed(seed) → torch.manual_seed(0)
    task.stream(batch_size, seed) → task.stream(batch_size, 0)
    clip or math.inf → math.inf
    weight_decay=weight_decay, → weight_decay=0.0,
    (math.isfinite(value) and math.isfinite(norm)) → math.isfinite(value)
    max(0, i - window + 1) → max(0, i - window)
    optimizer.zero_grad()  # a gradient from before → # a gradient from before
peft_lessons/data/base_models.py: base_models
    end[0] if isinstance(end, list) else end → end
    attention_mask[:, -states.shape[1] :] → attention_mask[:, : states.shape[1]]
peft_lessons/data/tasks.py: tasks
    return rng.permutation(order.reshape(-1, size)) → return order.reshape(-1, size)
peft_lessons/hf/trainer.py: language_models
    save_total_limit=2, → save_total_limit=1,
peft_lessons/data/assistant.py: assistant
    2, inputs).swapaxes(1, 2).reshape → 2, inputs).reshape
    HEADS if name == "attn_q" else KEY_VALUE_HEADS → HEADS if name == "attn_k" else KEY_VALUE_HEADS
    if (digest := sha256_of(gguf)) != GGUF_SHA256: → if False:
    not psutil.pid_exists(int(owner)) → True
    if not _whole():  # nor was → if False:  # nor was
peft_lessons/data/bundled.py: assistant
    return verify and sha256_of(file) != entry["sha256"] → return False
peft_lessons/data/own.py: own
    " ".join(m["content"].split()).casefold() → m["content"]
    if split != split_before: → if False:
    raw.decode("utf-8-sig") → raw.decode("utf-8")
    max(1, round(share * len(keys))) → round(share * len(keys))
    line = reader.line_num + 1 → line += 1
peft_lessons/deploy/export.py: export
    return _side_by_side(values, config.num_key_value_heads) → return values
    path if letter == "B" else "", config → "", config
    math.sqrt(said["r"]) if said.get("use_rslora") else 1.0 → 1.0
    if injection is not None and not injection.merged: → if False:
    return "smollm" if steps → return "gpt-2" if steps
    or (tied and path == _HEAD) → or False
    elif path in _OUTSIDE and → elif False and
peft_lessons/deploy/server.py: server
    float(scales.get(name, 0.0)) → float(scales.get(name, 1.0))
    if check and "meta" not in → if False and "meta" not in
    int(wanted)) if wanted.isdecimal() and int(wanted) else cores() → 64)
peft_lessons/deploy/header.py: server
    if end > size: → if False:
peft_lessons/deploy/chat.py: talk
    line.removeprefix("\\ufeff") → line
peft_lessons/checks/compare.py: kit
    if gap.max() <= tolerance → if gap.mean() <= tolerance
    tolerance = tolerance and max(tolerance, 4 * torch.finfo(expected.dtype).eps) → pass
    if not _serves(got.dtype, expected.dtype, form): → if False:
    return form == "wider" and floats and → return floats and
peft_lessons/checks/calls.py: kit
    flat @ torch.linspace(-1, 1.5, flat.numel(), dtype=torch.float64) → flat.sum()
    is_learners and "NotImplementedError" in code.co_names and "raise" in line → is_learners
    is_learners = frame.f_globals.get("__name__") == module → is_learners = True
peft_lessons/checks/runs.py: kit
    if gradient is None and wanted is not None: → if False:
    in numbers if i <= number → in numbers if i == number
peft_lessons/checks/compared.py: kit
    if fault.missing and yours.numbers_agree(self.right_runs): → if fault.missing:
peft_lessons/testing/conformance.py: conformance
    isinstance(error, ValueError | TypeError) and named → named
    isinstance(error, ValueError | TypeError) and named → isinstance(error, ValueError | TypeError)
tools/notebooks.py: notebook_rules
    if missing: → if False:
    if SOLVED & {*tags(cell)} or imported(cell)] → if imported(cell)]
classroom/grade.py: gradebook grade
    if first != word: → if not first:
    return Result.read(file → raise ValueError(file
    memory_of(process.pid) > limits.memory → memory_of(process.pid) < -limits.memory
    written_by(process.pid, place) > room → written_by(process.pid, place) < -room
    (student, lesson) not in handed: → lesson not in handed:
    maximum * rules.share(days) * share → maximum * share
    if rules.partial and outcome → if outcome
    if result.lasting and → if
    judgments[last.at] = last.rest → break
    elif full or ended in (TROUBLE, KILLED) → elif full
    lost.add(last.at) → pass
    len(Path(here).parts) - top > DEEPEST → False
    rank < self._ranks[key]: → rank > self._ranks[key]:
classroom/gradebook.py: gradebook submissions
    days = int(bool(one.late) → days = int(bool(0)
    if canvas: → if not canvas:
    not marks or unmarked(marks) → not marks
    message = message.replace(cause, "") → pass
    if points is None else replace → if True else replace
classroom/submissions.py: submissions
    rank = (not copy and not (inner and prefix), number, seconds) → rank = seconds
    mark = canvas(who) if platform else None → mark = canvas(who)
    if row.keys() & CANVAS_ONLY → if row
    return fit[0] if len(fit) == 1 else None → return fit[0]
    re.S | re.I) → re.S)
    part not in ("/", "..") → part
    if 0 < (seconds := float(done.stdout)) < LATEST: → if seconds := float(done.stdout):
    if len(by_id) == 1 else None → if len(by_id) == 1 else people[0]
    if len(owners) > 1} → if len(owners) > 9}
classroom/grade_one.py: grade
    getattr(package.check, module), variant) → getattr(package.check, module), 0)
    with suppress(ValueError, OSError, AttributeError): → if True:
    class TimedOut(BaseException): → class TimedOut(Exception):
    package.check = package.checks = nothing → pass
    if (is_ours and {"long", "check"} & kinds) or → if ({"long", "check"} & kinds) or
    if not is_ours or (stub and name not in ran.answers): → if True:
    cell.get("id") not in lesson.long and ( → (
    if again[0] == "right": → if False:
peft_lessons/checks/compared.py: kit
    return 0.75 → return 1.0
    return mended if mended < 1 else 0.75 → return mended
    len(shares) * (1.0 if self.staged else 0.5) → len(shares)
    return sum(agree) / len(expected) if → return 0.0 if
peft_lessons/checks/diagnosis.py: exercises
    if given.get(run) == cause] → if run in given]
    if count > 1] → if count > 5]
    if run not in right → if run in right
    sorted([*others, *(cause → sorted([*(cause
peft_lessons/checks/adalora.py: exercises
    function = adalora_step.reference → pass
peft_lessons/checks/adapters.py: exercises
    p.zero_() → p.mul_(1.0)
    if not torch.equal(four[name], start[name])] → if name]
peft_lessons/checks/beyond.py: exercises
    if used:  # a frozen one, too, which may have trained before → if False:
    self.head.weight = self.table.weight → pass
peft_lessons/checks/choosing.py: exercises
    if parts[told] < 0.95 * max(parts.values()): → if False:
    if half >= page["margin"]: → if False:
peft_lessons/checks/dora.py: exercises
    linear.weight.copy_(2 * V - alpha / rank * B @ A) → linear.weight.copy_(2 * V)
peft_lessons/checks/ia3.py: exercises
    seen[trains] = trained if trains in look else _TRAINED → seen[trains] = trained
peft_lessons/checks/prefix.py: exercises
    torch.eye(T), -1e3 * torch.eye(T) → torch.eye(T), torch.eye(T)
peft_lessons/checks/prompt.py: exercises
    sees[-1, :-2] = 0 → pass
    noise = self.rounding * → noise = 0.0 *
peft_lessons/checks/qlora.py: exercises
    return _packed(codes.repeat_interleave(2)), absmax → return _packed(codes.repeat(2)), absmax
peft_lessons/checks/deploy.py: exercises
    if _key(a) == _key(b) → if a["prompt"] == b["prompt"]
    for x in both: → for x in (both[0], both[0]):
    if which == "b" and module in → if module in
peft_lessons/checks/kit.py: kit
    return passed / len(self.trials) / 2 → return 0.0
peft_lessons/costs/evidence.py: recommend
    max(size, examples) / min(size, examples) → abs(size - examples)
    math.sqrt(MINILM * LLAMA) → (MINILM + LLAMA) / 2
peft_lessons/costs/recommend.py: recommend
    [asked.size >= SPEAKS[asked.kind]] → [asked.size > SPEAKS[asked.kind]]
    (self.usable - need.total) / GB → (self.usable - need.total) / GIB
peft_lessons/costs/estimate.py: estimate
    self.full or self.method.prompt > 0 → self.full
""")


def noticed(mutant: Mutant, place: Path) -> str | None:
    """Return the first test that fails on the copy in `place` with this fault, or None."""
    path = place / mutant.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, *mutant.tests.split()],
            cwd=place,
            env=offline_environment() | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
    finally:
        path.write_text(text, encoding="utf-8")
    match = re.search(r"(?m)^(?:FAILED|ERROR) (\S+)", done.stdout)
    return match.group(1) if match and done.returncode else None


def main(words: Sequence[str]) -> int:
    """Try the faults that the arguments choose, all if there are none; return how many are
    missed."""
    chosen = [m for m in MUTANTS if not words or any(word in f"{m.file} {m.old}" for word in words)]
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, place / name)
        for rest in ROOT.iterdir():
            if rest.name not in (*COPIED, ".git", ".venv"):
                (place / rest.name).symlink_to(rest)
        for number, mutant in enumerate(chosen, 1):
            started = time.monotonic()
            test = noticed(mutant, place)
            missed += test is None
            took = time.monotonic() - started
            print(f"{number:3} {mutant}\n    {test or 'NOT NOTICED'} ({took:.0f} s)", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults are noticed")
    return missed


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
