"""Every check accepts the solution and right answers of other styles, and names what is wrong."""

import gc
import importlib
import importlib.util
import inspect

import pytest
import torch
from exercises import Recipe

from peft_lessons import check, registered_methods
from peft_lessons.checks.kit import Check, WrongAnswer
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


SOLUTIONS = {lesson: solutions(lesson) for lesson in LESSONS}
IMPORTED = {lesson: next(iter(own.values())).__globals__ for lesson, own in SOLUTIONS.items()}
CHECKS = {lesson: checks(lesson) for lesson in LESSONS}
ANSWERS = {lesson: importlib.import_module(f"exercises.{lesson}").answers for lesson in LESSONS}
EXERCISES = [(lesson, name) for lesson in LESSONS for name in CHECKS[lesson]]
WRONG = [(lesson, *answer) for lesson in LESSONS for answer in ANSWERS[lesson].wrongs]
RIGHT = [(lesson, *answer) for lesson in LESSONS for answer in ANSWERS[lesson].rights]
CAUSES = [
    pytest.param(one, sentence, wrong, id=f"{one.__name__}-{i}")
    for found in CHECKS.values()
    for one in found.values()
    for i, (sentence, wrong) in enumerate(one.causes.items())
]
gc.freeze()  # what was imported stays: each look for what may go would go through all of it
by_name = {"ids": lambda value: getattr(value, "__name__", None)}


@pytest.fixture(autouse=True)
def no_answer_stays_a_method():
    yield
    if any(method.__module__.startswith("exercises.") for method in registered_methods()):
        gc.collect()


def handed_over(answer):
    return answer.make() if isinstance(answer, Recipe) else answer


def refusal(one, answer):
    with pytest.raises(WrongAnswer) as caught:
        one(answer)
    return str(caught.value)


@pytest.mark.parametrize("lesson", LESSONS)
def test_checks_solutions_and_answers_belong_together(lesson):
    names = set(CHECKS[lesson])
    assert names == set(SOLUTIONS[lesson])
    for name in names:
        assert sum(exercise == name for exercise, *_ in ANSWERS[lesson].wrongs) >= 4
        assert sum(exercise == name for exercise, *_ in ANSWERS[lesson].rights) >= 2
    assert {exercise for exercise, *_ in ANSWERS[lesson].wrongs + ANSWERS[lesson].rights} == names


@pytest.mark.parametrize(("lesson", "name"), EXERCISES)
def test_solution_is_right(lesson, name, monkeypatch):
    monkeypatch.setenv("PEFT_LESSONS_STRICT", "1")
    verdict = CHECKS[lesson][name](SOLUTIONS[lesson][name])
    assert verdict.status == "right"
    assert repr(verdict).startswith(f"✓ {name}: right.\n")


@pytest.mark.parametrize(("lesson", "name"), EXERCISES)
def test_a_check_leaves_the_notebooks_random_numbers_alone(lesson, name):
    before = torch.get_rng_state()
    CHECKS[lesson][name](SOLUTIONS[lesson][name])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("lesson", "name", "answer"), RIGHT, **by_name)
def test_right_answer_in_another_style(lesson, name, answer):
    assert CHECKS[lesson][name](handed_over(answer)).status == "right"


@pytest.mark.parametrize(("lesson", "name", "answer", "told"), WRONG, **by_name)
def test_wrong_answer_is_told_its_cause(lesson, name, answer, told):
    message = refusal(CHECKS[lesson][name], handed_over(answer))
    assert told in message
    # A cause that is named is the one that this answer was written for, or none is.
    assert "Likely cause" not in message or told in message.partition("Likely cause: ")[2]
    assert message.startswith(f"✗ {name}: ")
    assert len(message.splitlines()) <= 5


@pytest.mark.parametrize(("one", "sentence", "wrong"), CAUSES)
def test_a_cause_is_named_alone(one, sentence, wrong):
    """The wrong function behind every cause is refused, with this cause and no other."""
    assert refusal(one, wrong).splitlines()[-1].strip() == f"Likely cause: {sentence}."


def shuffled(solution):
    """Right in kind and shape, random in value, or a wrong number of the same type."""

    def change(value):
        if isinstance(value, torch.Tensor):
            return torch.rand(value.shape).to(value.dtype)
        if isinstance(value, tuple | list):
            return type(value)(change(v) for v in value)
        return value + 1

    return lambda *args: change(solution(*args))


ANY = {
    "nothing": lambda *args: None,
    "a string": lambda *args: "W",
    "a number": lambda *args: 7,
    "an empty list": lambda *args: [],
    "the first argument": lambda *args: args[0],
}


@pytest.mark.parametrize(("lesson", "name"), EXERCISES)
def test_no_cheap_answer_passes(lesson, name):
    one = CHECKS[lesson][name]
    for answer in ANY.values():
        assert f"✗ {name}: " in refusal(one, answer)
    if name != "apply_lora":
        refusal(one, shuffled(SOLUTIONS[lesson][name]))
    first = []

    def constant(*args):
        first.append(one.reference(*args)) if not first else None
        return first[0]

    refusal(one, constant)


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
        found = [c for c in nb.cells if notebooks.is_check_of(c, lesson, name)]
        assert len(found) == 1, f"one cell tagged check must be check.{lesson}.{name}({name})"


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
    """PEFT's LoRA with r 4 and alpha 6 on a token table and a linear layer."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Embedding(23, 10), torch.nn.Linear(10, 7))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=["0", "1"]))
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p)
    return model.base_model.model


def test_embedding_lora_equals_peft(peft_adapted):
    layer, ids = peft_adapted[0], torch.tensor([[3, 0, 22], [3, 3, 9]])
    A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    got = SOLUTIONS["lora"]["embedding_lora"](ids, layer.base_layer.weight, A, B, 6)
    torch.testing.assert_close(got, layer(ids), atol=1e-6, rtol=0)


def test_unmerge_lora_undoes_peft(peft_adapted):
    layer = peft_adapted[1]
    before = layer.base_layer.weight.detach().clone()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    layer.merge()
    got = SOLUTIONS["lora"]["unmerge_lora"](layer.base_layer.weight, A, B, 6)
    torch.testing.assert_close(got, before, atol=1e-5, rtol=0)
