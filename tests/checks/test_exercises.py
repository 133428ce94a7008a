"""Every check accepts the solution and right answers of other styles, and names what is wrong."""

import importlib
import importlib.util
import inspect
from itertools import combinations

import numpy as np
import pytest
import torch
from exercises import Answers, Recipe

from classroom.grade_one import without_raise
from peft_lessons import check
from peft_lessons.checks.compare import tensors
from peft_lessons.checks.kit import Check, Compared, Tried, WrongAnswer, draw_variant
from peft_lessons.studies import load_results
from tools import notebooks

LESSONS = {
    module: notebooks.NOTEBOOKS / f"{stem}.ipynb"
    for stem, module in notebooks.MODULES.items()
    if (notebooks.NOTEBOOKS / "solutions" / f"{module}.py").exists()
}


def solutions(lesson):
    path = notebooks.NOTEBOOKS / "solutions" / f"{lesson}.py"
    spec = importlib.util.spec_from_file_location(f"solutions_{lesson}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    own = {name: value for name, value in vars(module).items() if callable(value)}
    return {n: v for n, v in own.items() if v.__module__ == module.__name__}


def checks(lesson):
    return {n: c for n, c in vars(getattr(check, lesson)).items() if isinstance(c, Check)}


def answers_of(lesson):
    """Answers that say more than a check's own mistakes do; a lesson need not have any."""
    if importlib.util.find_spec(f"exercises.{lesson}"):
        return importlib.import_module(f"exercises.{lesson}").answers
    return Answers()


SOLUTIONS = {lesson: solutions(lesson) for lesson in LESSONS}
IMPORTED = {
    lesson: next(f.__globals__ for f in own.values() if inspect.isfunction(f))
    for lesson, own in SOLUTIONS.items()
}
CHECKS = {lesson: checks(lesson) for lesson in LESSONS}
ANSWERS = {lesson: answers_of(lesson) for lesson in LESSONS}
EXERCISES = [(lesson, name) for lesson in LESSONS for name in CHECKS[lesson]]
WRONG = [(lesson, *answer) for lesson in LESSONS for answer in ANSWERS[lesson].wrongs]
RIGHT = [(lesson, *answer) for lesson in LESSONS for answer in ANSWERS[lesson].rights]
HUNTS = [
    (lesson, name) for lesson, name in EXERCISES if getattr(CHECKS[lesson][name], "hunted", ())
]
CAUSES = [
    pytest.param(one, sentence, wrong, id=f"{one.__name__}-{i}")
    for lesson in LESSONS
    for one in CHECKS[lesson].values()
    for i, (sentence, wrong) in enumerate(one.causes.items())
]
by_name = {"ids": lambda value: getattr(value, "__name__", None)}


def handed_over(answer):
    return answer.make() if isinstance(answer, Recipe) else answer


def refusal(one, answer, help=True):
    """Return what is said of a wrong answer, with what a hunt says on request."""
    try:
        one(answer, help=help)
    except WrongAnswer as error:
        return str(error)
    pytest.fail(
        f"{one.__name__} accepts a wrong answer: add a case in which this answer and the solution "
        "give different results"
    )


@pytest.mark.parametrize("lesson", LESSONS)
def test_checks_solutions_and_answers_belong_together(lesson):
    names = set(CHECKS[lesson])
    assert names == set(SOLUTIONS[lesson])
    for name in names:
        one, answers = CHECKS[lesson][name], ANSWERS[lesson]
        wrongs = sum(exercise == name for exercise, *_ in answers.wrongs)
        rights = sum(exercise == name for exercise, *_ in answers.rights)
        assert wrongs + len(one.causes) >= 4, (
            f"{name} has {wrongs + len(one.causes)} wrong answers, at least 4 are required: add "
            f"mistakes in checks/{lesson}.py or wrong answers in tests/exercises/{lesson}.py"
        )
        assert rights or one.right, (
            f"{name} has no right answer: write its causes with mistakes(...) in "
            f"checks/{lesson}.py, or add a right answer in tests/exercises/{lesson}.py"
        )
    assert {exercise for exercise, *_ in answers.wrongs + answers.rights} <= names


@pytest.mark.parametrize(("lesson", "name"), EXERCISES)
def test_solution_is_right_and_the_notebooks_random_numbers_stay(lesson, name, monkeypatch):
    monkeypatch.setenv("PEFT_LESSONS_STRICT", "1")
    before = torch.get_rng_state()
    verdict = CHECKS[lesson][name](SOLUTIONS[lesson][name])
    assert verdict.status == "right"
    assert repr(verdict).startswith(f"✓ {name}: right.\n")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("variant", [3000, 7_919_000])
def test_solutions_are_right_for_other_inputs_too(variant):
    """Those that marking draws for a student."""
    for lesson in LESSONS:
        for name, one in vars(draw_variant(getattr(check, lesson), variant)).items():
            if isinstance(one, Compared):
                assert one(SOLUTIONS[lesson][name]).status == "right"


@pytest.mark.parametrize(("lesson", "name", "answer"), RIGHT, **by_name)
def test_right_answer_in_another_style(lesson, name, answer):
    assert CHECKS[lesson][name](handed_over(answer)).status == "right"


@pytest.mark.parametrize(("lesson", "name", "answer", "words"), WRONG, **by_name)
def test_a_wrong_answer_gets_its_cause(lesson, name, answer, words):
    one = CHECKS[lesson][name]
    message = refusal(one, handed_over(answer))
    assert words in message
    # A cause that is named is the one that this answer was written for, or none is.
    assert "Likely cause" not in message or words in message.partition("Likely cause: ")[2]
    assert message.startswith(f"✗ {name}: ")
    brief = message if "Look at" not in message else refusal(one, answer, help=False)
    assert len(brief.splitlines()) <= 5


@pytest.mark.parametrize(("one", "sentence", "wrong"), CAUSES)
def test_a_cause_is_named_alone(one, sentence, wrong):
    """The wrong function behind every cause is refused, with this cause and no other."""
    message = refusal(one, wrong)
    lead = "Still wrong" if getattr(one, "bugs", ()) else "Likely cause"
    assert message.splitlines()[-1].strip() == f"{lead}: {sentence}.", (
        f"expected the cause {sentence!r} alone. If the check names several causes, add a case "
        "that tells them apart. If the check names none because the answer fails a case that must "
        f"raise, move the mistake to tests/exercises/. The check says:\n{message}"
    )


@pytest.mark.parametrize(("lesson", "name"), HUNTS)
def test_a_hunt_counts_what_is_mended_and_names_causes_on_request(lesson, name):
    one, answers = CHECKS[lesson][name], ANSWERS[lesson]
    assert name in answers.hunts, f"add @answers.hunt({name!r}) in tests/exercises/{lesson}.py"
    make, bugs = answers.hunts[name], one.hunted
    assert one(make([])).status == "right"
    sets = [left for n in range(1, len(bugs) + 1) for left in combinations(bugs, n)]
    for left in sets:
        answer, mended = make(left), len(bugs) - len(left)
        counted = f"{mended} of {len(bugs)} faults {'is' if mended == 1 else 'are'} mended"
        asked, told = refusal(one, answer), refusal(one, answer, help=False)
        assert told.startswith(f"✗ {name}: {counted}.\n  Here, ")
        assert told.endswith(f"\n  For help: check.{lesson}.{name}({name}, help=True)")
        assert not any(sentence in told for sentence in one.explanations)
        assert [s for s in one.explanations if s in asked] == [left[0]], "that of the call"
        assert ("Likely cause" in asked) == (left[0] in one.causes)
        assert one.credit(answer) == pytest.approx(mended / len(bugs))


@pytest.mark.parametrize(("lesson", "name"), HUNTS)
def test_the_given_code_of_a_hunt_has_all_its_bugs(lesson, name):
    one, names = CHECKS[lesson][name], dict(IMPORTED[lesson])
    stubs = {
        notebooks.exercise_name(cell): cell.source
        for cell in notebooks.exercise_cells(notebooks.read(LESSONS[lesson]))
    }
    exec(without_raise(stubs[name]), names)
    assert f": 0 of {len(one.hunted)} faults are mended" in refusal(one, names[name])


@pytest.mark.parametrize(
    "one", [CHECKS[k][n] for k, n in EXERCISES if CHECKS[k][n].right], **by_name
)
def test_what_mistakes_are_edits_of_is_right(one):
    assert one(one.right).status == "right"


# ------------------------------------------------------------------ faults of any exercise


def parts(value):
    """Yield every tensor in a value, and every list, dict and module."""
    if isinstance(value, torch.nn.Module):
        return list(value.parameters())
    if isinstance(value, list | tuple | dict):
        held = value.values() if isinstance(value, dict) else value
        inner = [part for v in held for part in parts(v)]
        return inner if isinstance(value, tuple) else [*inner, value]
    return [value] if isinstance(value, torch.Tensor) else []


def spoil(part):
    """Change a tensor, a list or a dict in place."""
    if isinstance(part, torch.Tensor):
        part.data.logical_not_() if part.dtype is torch.bool else part.data.add_(1)
    elif part:
        del part[next(iter(part)) if isinstance(part, dict) else 0]


def own(t):
    """Return a copy of a tensor that may be a view of an argument."""
    return t if isinstance(t, torch.nn.Parameter) else t.clone()


def changing(number):
    """Return the solution, which then changes its argument of this number."""

    def fault(solution):
        def answer(*args):
            result = of_tensors(own)(solution)(*args)
            for part in parts(args[number])[:1]:
                spoil(part)
            return result

        return answer

    return fault


def of_tensors(change):
    """Return the solution with every tensor in its result changed."""

    def changed(value):
        if isinstance(value, torch.Tensor):
            return change(value)
        if isinstance(value, tuple | list):
            return type(value)(changed(v) for v in value)
        if isinstance(value, dict):
            return {name: changed(v) for name, v in value.items()}
        return value

    return lambda solution: lambda *args: changed(solution(*args))


def narrower(t):
    return t.float() if t.dtype == torch.float64 else t.half()


def same_numbers(value):
    """Return the numbers of a result in other types, which are as right."""
    if isinstance(value, torch.Tensor):
        kept = isinstance(value, torch.nn.Parameter) or not value.is_floating_point()
        return value if kept else value.double()
    if isinstance(value, tuple | list):
        return [same_numbers(v) for v in value]
    if type(value) is dict:
        return {name: same_numbers(v) for name, v in value.items()}
    if type(value) is float:
        return torch.tensor(value, dtype=torch.float64)
    return float(value) if type(value) is int else value


def shuffled(value):
    """Return a value of the right kind and shape with random values, or a wrong number."""
    if isinstance(value, torch.Tensor):
        return torch.rand(value.shape).to(value.dtype)
    if isinstance(value, tuple | list):
        return type(value)(shuffled(v) for v in value)
    return value + 1


def renamed(solution, names):
    """Return the solution under another signature."""

    def answer(*args):
        return solution(*args)

    by_name = inspect.signature(solution).parameters
    answer.__signature__ = inspect.Signature([by_name[name] for name in names])
    return answer


def returns_what_is_compared(one, solution):
    """Return whether the faults of what a function returns apply: not to what trials judge, nor to
    a class whose use is compared with a function."""
    return not isinstance(one, Tried) and inspect.isclass(solution) == inspect.isclass(
        one.reference
    )


def faults(one, solution):
    """Yield (answer, part of its verdict) for the faults that any answer may have, if they
    apply."""
    for cheap in (None, "W", 7, []):
        yield lambda *args, cheap=cheap: cheap, f"✗ {one.__name__}: "
    yield lambda *args: args[0], f"✗ {one.__name__}: "
    if not returns_what_is_compared(one, solution):
        return
    yield lambda *args: None, "is None: is a return statement missing?"
    names, args = one.names, one.arguments(0)
    result = solution(*one.arguments(0))
    floats = [t for t in tensors(result) if t.is_floating_point()]
    for number, name in enumerate(names[: len(args)]):
        # A module that is built around another one computes with the changed one.
        held = isinstance(result, torch.nn.Module) and isinstance(args[number], torch.nn.Module)
        if parts(args[number]) and name not in one.changes and not held:
            yield changing(number)(solution), f"the argument {name} was changed"
    if len(names) > 1:
        required = [n for n in names if one.signature.parameters[n].default is inspect._empty]
        if len(required) > 1:
            turned = [*required[1::-1], *required[2:], *names[len(required) :]]
            yield renamed(solution, turned), "the parameters differ"
    if one.gradients:
        yield of_tensors(lambda t: t.detach())(solution), "no gradient reaches"
    if floats and not isinstance(result, torch.nn.Module):
        yield of_tensors(narrower)(solution), " dtype float"
        yield of_tensors(lambda t: t[None])(solution), " shape ("
        yield of_tensors(lambda t: t.tolist())(solution), ", expected a tensor"
        yield lambda *args: shuffled(solution(*args)), f"✗ {one.__name__}: "


@pytest.mark.parametrize(("lesson", "name"), EXERCISES)
def test_a_fault_that_any_answer_may_have_is_named(lesson, name):
    one, solution = CHECKS[lesson][name], SOLUTIONS[lesson][name]
    for answer, words in faults(one, solution):
        assert words in refusal(one, answer)
    first = []

    def constant(*args):
        first.append(one.reference(*args)) if not first else None
        return first[0]

    refusal(one, constant)


def gives_numbers(lesson, name):
    """Return whether a result is made of numbers whose dtype is not the point."""
    one = CHECKS[lesson][name]
    compared = returns_what_is_compared(one, SOLUTIONS[lesson][name])
    return compared and not one.changes and one.form != "same"


@pytest.mark.parametrize(("lesson", "name"), [e for e in EXERCISES if gives_numbers(*e)])
def test_equal_numbers_of_another_type_are_right(lesson, name):
    one, solution = CHECKS[lesson][name], SOLUTIONS[lesson][name]
    assert one(lambda *args: same_numbers(solution(*args))).status == "right"


@pytest.mark.parametrize("lesson", LESSONS)
def test_stub_has_the_signature_of_the_solution(lesson, monkeypatch):
    """And an untouched stub is 'not attempted', a bug hunt's body included."""
    monkeypatch.delenv("PEFT_LESSONS_STRICT", raising=False)
    path = LESSONS[lesson]
    if not path.exists():
        pytest.skip(f"{path.name} is not written yet")
    nb = notebooks.read(path)
    # A stub's annotations need what the set-up cell imports, as those of the solution do.
    names = {n: v for n, v in IMPORTED[lesson].items() if n not in SOLUTIONS[lesson]}
    names["__name__"] = "__main__"
    stubs = [cell for cell in nb.cells if "exercise" in notebooks.tags(cell)]
    for cell in stubs:
        exec(compile(cell.source, path.name, "exec"), names)
    assert {notebooks.exercise_name(cell) for cell in stubs} == set(SOLUTIONS[lesson])
    for name, solution in SOLUTIONS[lesson].items():
        assert inspect.signature(names[name]) == inspect.signature(solution)
        assert names[name].__doc__ == solution.__doc__
        assert CHECKS[lesson][name](names[name]).status == "not attempted"
        cells = [c for c in nb.cells if notebooks.is_check_of(c, lesson, name)]
        assert len(cells) == 1, f"one cell tagged check must be check.{lesson}.{name}({name})"


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    layers = torch.nn.Sequential(*[torch.nn.Linear(8, 8, bias=False) for _ in range(5)])
    layers[:3].requires_grad_(False)
    x = torch.randn(7, 8, requires_grad=True)  # the embedding below would want this gradient
    with FlopCounterMode(display=False) as counter:
        layers(x).sum().backward()
    assert SOLUTIONS["why"]["step_flops"](5 * 64, 2 * 64, 7) == counter.get_total_flops()


def test_bytes_of_known_models():
    """LLaMA-7B at 16 bytes a parameter, and with LoRA of rank 8 on query and value."""
    training_bytes = SOLUTIONS["why"]["training_bytes"]
    assert training_bytes(6_738_415_616, 6_738_415_616) == 107_814_649_856
    assert training_bytes(6_738_415_616, 4_194_304) - 2 * 6_738_415_616 == 58_720_256


@pytest.fixture(scope="module")
def peft_adapted():
    """Return two of PEFT's adapters, r 4 and alpha 6 and 2, on a token table and a linear layer."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Embedding(23, 10), torch.nn.Linear(10, 7))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=["0", "1"]))
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=2, target_modules=["0", "1"]))
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p)
    return model.base_model.model


def test_embedding_lora_equals_peft(peft_adapted):
    layer, ids = peft_adapted[0], torch.tensor([[3, 0, 22], [3, 3, 9]])
    A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    got = SOLUTIONS["lora"]["embedding_lora"](ids, layer.base_layer.weight, A, B, 6)
    torch.testing.assert_close(got, layer(ids), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("lesson", "name"), [e for e in EXERCISES if e[1].startswith(("diagnose", "defend_release"))]
)
def test_a_lesson_lists_the_causes_that_its_check_knows(lesson, name):
    text = "\n".join(cell.source for cell in notebooks.read(LESSONS[lesson]).cells)
    listed = {line.removeprefix("- ") for line in text.splitlines() if line.startswith("- ")}
    assert set(SOLUTIONS[lesson][name]().values()) - {"ships"} <= listed


def test_what_is_said_of_the_broken_runs_is_in_their_reports():
    rows = load_results("broken_runs").set_index("run")
    healthy, gradients = rows.loc["healthy"], ["grad_A_first", "grad_B_first", "grad_A_last"]
    assert (rows.loc["A", gradients] == "").all() and rows.loc["A", "change"] == 0
    assert 1.9 < rows.loc["B", "trainable"] / healthy["trainable"] < 2.1
    assert (rows.loc["C", ["grad_B_last", "grad_A_last"]].astype(float) > 0.01).all()
    assert rows.loc["C", "change"] < healthy["change"] / 10
    assert healthy["trainable"] - rows.loc["D", "trainable"] == 770
    assert (rows.loc["E", [*gradients, "grad_B_last"]].astype(float) == 0).all()


def test_what_is_said_of_the_broken_codes_is_in_their_histograms():
    rows = load_results("broken_codes").set_index("run")
    uses = {run: [float(use) for use in text.split()] for run, text in rows["uses"].items()}
    error, qlora = rows["error"], uses["QLoRA"]
    assert all(abs(sum(shares) - 100) < 0.1 for shares in uses.values())
    assert error.idxmin() == "A" and min(uses["A"]) > 5
    assert 1.9 < error["B"] / error["QLoRA"] < 2.1 and uses["B"][15] > 2 * qlora[15]
    assert max(uses["C"][0], uses["C"][15]) < 0.1
    assert uses["D"][15] > 2 * uses["D"][0] and abs(error["D"] - error["QLoRA"]) < 0.1
    assert max(abs(a - b) for a, b in zip(uses["D"][1:15], qlora[1:15], strict=True)) < 0.2
    assert uses["E"][15] == 0 and all(abs(uses["E"][k] - uses["E"][14 - k]) < 0.5 for k in range(7))


def test_what_is_said_of_the_broken_rows_is_in_them():
    rows = load_results("broken_rows").set_index("run")
    turns, lengths = (
        {run: np.array(text.split(), dtype=float) for run, text in rows[column].items()}
        for column in ("turns", "lengths")
    )
    assert (lengths["A"] < 0.99).sum() <= 2 and (lengths["healthy"] < 0.99).sum() > 30
    assert np.corrcoef(turns["A"], lengths["A"])[0, 1] > 0.8
    assert np.abs(lengths["B"] - 1).mean() > 5 * np.abs(lengths["healthy"] - 1).mean()
    assert np.median(turns["B"]) < 1.2 * np.median(turns["healthy"])
    assert (turns["C"] == 0).all() and lengths["C"].std() > 0.02 and (lengths["D"] == 1).all()
    assert turns["E"].min() > 4 and (turns["healthy"] < 4).sum() > 30


def test_what_is_said_of_the_broken_knobs_is_in_them():
    rows = load_results("broken_knobs").set_index("run")
    knobs = {
        kind: rows[kind].str.split().map(lambda q: np.array(q, dtype=float))
        for kind in ("k", "v", "ff")
    }
    middle = {kind: quantiles.map(np.median) for kind, quantiles in knobs.items()}
    score, healthy = rows["perplexity"], rows["perplexity"]["healthy"]
    assert score["A"] == healthy and score["D"] > 5 * healthy and score["E"] > 1.1 * healthy
    for kind, found in middle.items():
        assert 0.85 < found["healthy"] < 1.2 and found["B"] < 0.8 and abs(found["A"]) < 0.2
        assert abs(found["D"]) < 0.5 and np.abs(knobs[kind]["E"] - 1).max() < 0.5
    assert rows["widths"].to_dict() == dict.fromkeys(rows.index, "96 96 512") | {"C": "96 96 192"}


def test_what_is_said_of_the_broken_rewards_is_in_their_curves():
    curves = {
        name: {
            run: np.array(text.split(), dtype=float)
            for run, text in load_results("broken_rewards").set_index("run")[name].items()
        }
        for name in ("reward", "flat", "surprisal")
    }
    reward, flat, surprisal = curves.values()
    first, healthy = surprisal["healthy"][0], surprisal["healthy"][-3:].mean()
    assert reward["healthy"][-3:].mean() > 2 * reward["healthy"][0] and healthy < first / 2
    assert reward["A"][-6:].min() > 0.95 and surprisal["A"][-3:].min() > 2 * healthy
    assert (reward["B"] == 0).all() and (flat["B"] == 1).all()
    assert (reward["C"][-3:] == 0).all() and reward["C"].max() > 0.5
    assert surprisal["C"][-3:].max() < first / 4
    assert (reward["D"] > 0).all() and surprisal["D"][-3:].mean() > 0.8 * first


def test_what_is_said_of_the_release_files_is_in_their_table():
    rows = load_results("release_files").set_index("file")
    trainer, letters = rows.loc["trainer"], rows.loc[list("ABCDE")]
    assert list(letters.index[letters["mb"] > 120]) == ["A"]
    assert letters["perplexity"].idxmin() == "A"
    assert list(letters.index[letters["high"] < 0]) == []
    assert list(letters.index[letters["low"] > 0]) == ["B"]
    assert letters.loc["B", "right"] < trainer["right"] / 2
    assert letters.loc["B", "perplexity"] < 1.02 * trainer["perplexity"]
    assert letters["right"].idxmax() == "C" and letters.loc["C", "mb"] == letters.loc["D", "mb"]
    assert letters.loc["C", "gap"] > 5 * letters.loc["D", "gap"]
    assert 0.8 < letters.loc["D", "gap"] / letters.loc["A", "gap"] < 1.25
    assert list(letters.index[letters["other_ids"] > 0]) == ["E"]
    like = ["mb", "right", "behind", "low", "high", "perplexity"]
    assert (letters.loc["D", like] == letters.loc["E", like]).all()
    assert letters.loc["E", "gap"] < 1.25 * letters.loc["D", "gap"]


def test_adam_s_first_step_lowers_the_loss_by_the_gradient_sum():
    one, lr = CHECKS["beyond"]["gradient_sum"], 1e-6
    model, batches, factors = one.arguments(3)
    model.double()
    g = SOLUTIONS["beyond"]["gradient_sum"](model, batches, factors)
    groups = [
        {"params": [p], "lr": lr * factors.get(name, 1)}
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    optimizer = torch.optim.Adam(groups, eps=1e-16)
    before = sum(model(**batch).loss for batch in batches) / len(batches)
    before.backward()
    optimizer.step()
    after = sum(model(**batch).loss for batch in batches) / len(batches)
    assert (before - after).item() / lr == pytest.approx(g, rel=1e-3)


def test_serve_lora_equals_a_mixed_batch_of_peft(peft_adapted):
    layer, names = peft_adapted[1], ["default", "other"]
    x, served = torch.randn(4, 3, 10), ["other", "__base__", "default", "other"]
    A = torch.stack([layer.lora_A[name].weight for name in names])
    B = torch.stack([layer.lora_B[name].weight for name in names])
    scaling = torch.tensor([layer.scaling[name] for name in names])
    got = SOLUTIONS["lora"]["serve_lora"](x, A, B, scaling, torch.tensor([1, -1, 0, 1]))
    expected = layer(x, adapter_names=served) - layer.base_layer(x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
