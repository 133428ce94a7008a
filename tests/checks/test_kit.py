"""The kit of the checks: three outcomes, what each says, and what it never says."""

import copy
import re
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig

from peft_lessons.checks import kit
from peft_lessons.checks.compare import difference
from peft_lessons.checks.kit import Case, Forbid, Refused, WrongAnswer, check_for, draw_variant
from peft_lessons.checks.mistakes import mistakes


@pytest.fixture(autouse=True)
def not_strict(monkeypatch):
    monkeypatch.delenv("PEFT_LESSONS_STRICT", raising=False)
    monkeypatch.delenv("NBGRADER_EXECUTION", raising=False)


@check_for(
    cases=[
        Case(lambda: [torch.randn(3, 5), 3.0], note="the first"),
        Case(lambda: [torch.randn(4, 2).double(), -2.0]),
    ],
    gradients=("x",),
    causes={"the factor is left out": lambda x, k: x, "it is added": lambda x, k: x + k},
)
def scale(x, k):
    """Every entry is k times as large."""
    return x * k


def refusal(one, answer):
    with pytest.raises(WrongAnswer) as caught:
        one(answer)
    return str(caught.value)


# ------------------------------------------------------------------ right and not attempted


def test_right_says_what_was_verified():
    assert (scale.__name__, scale.__doc__) == ("scale", "Every entry is k times as large.")
    verdict = scale(lambda x, k: k * x)
    assert verdict.status == "right"
    assert repr(verdict) == (
        "✓ scale: right.\n  Every entry is k times as large. Verified: cases in which the "
        "result agrees: 2; gradients that agree: x; arguments left unchanged: x."
    )
    for other_names in (lambda a, factor: a * factor, torch.mul, lambda *a: a[0] * a[1]):
        assert scale(other_names).status == "right"


def stub(x, k):
    raise NotImplementedError


def hunt(x, k):
    raise NotImplementedError("remove this line when you start the hunt")


def test_an_untouched_stub_is_not_attempted_and_refused_in_strict_mode(monkeypatch):
    monkeypatch.setenv("PEFT_LESSONS_STRICT", "0")
    assert scale(hunt).status == "not attempted"
    assert repr(scale(stub)) == (
        "○ scale: not attempted yet.\n  Write the function, run its cell, then run this cell again."
    )
    monkeypatch.setenv("PEFT_LESSONS_STRICT", "1")
    assert refusal(scale, stub).startswith("✗ scale: not attempted yet.")
    assert scale(scale.reference).status == "right"


# ------------------------------------------------------------------ hunts


def test_a_hunt_says_how_much_is_right_and_more_on_request():
    def trial(answer):
        if answer() < 3:
            raise Refused(f"{answer()} of 3", "a fact", on_request=["b", "c"])
        return "all"

    def three():
        """All are found."""

    one = check_for(trials={trial: "?"}, share=lambda answer: answer() / 3)(three)
    assert one(lambda: 3).status == one(lambda: 3, help=True).status == "right"
    ask = "For help: check.test_kit.three(three, help=True)"
    assert refusal(one, lambda: 1) == f"✗ three: 1 of 3.\n  a fact\n  {ask}"
    with pytest.raises(WrongAnswer) as caught:
        one(lambda: 1, help=True)
    assert str(caught.value) == "✗ three: 1 of 3.\n  a fact\n  b\n  c"
    assert one.credit(lambda: 1) == 1 / 3
    with pytest.raises(WrongAnswer, match="the factor is left out.$"):
        scale(lambda x, k: x, help=True)


def test_in_a_hunt_a_bug_is_mended_once_all_the_cases_that_show_it_are_right():
    def call_before(function, x, k):
        return [function(x, k), k]

    @check_for(
        cases=[
            (2, 1),
            Case(lambda: [2, 3], bug="the factor is left out"),
            Case(lambda: [4, -3], bug="the factor is left out"),
            Case(lambda: [-2, 1], bug="x loses its sign"),
            Case(lambda: [-4, 1], "a second call", call_before, bug="x loses its sign"),
            kit.refused(lambda: [2, 0], "k", bug="a factor of zero is taken"),
            (-5, 7),
        ],
        causes={
            "the factor is left out": lambda x, k: x,
            "k loses its sign": lambda x, k: x * abs(k),
        },
    )
    def times(x, k):
        return x * k

    def answer(left, x, k):
        if k == 0 and "zero" not in left:
            raise ValueError("k is 0")
        return (abs(x) if "sign" in left else x) * (1 if "factor" in left else k)

    def told(function, help=False):
        with pytest.raises(WrongAnswer) as caught:
            times(function, help=help)
        return str(caught.value)

    ask = "For help: check.test_kit.times(times, help=True)"
    stub = partial(answer, "factor sign zero")
    count = "✗ times: 0 of 3 faults are mended.\n  Here, the result is 2, expected 6."
    assert told(stub) == f"{count}\n  Called with: x=2, k=3\n  {ask}"
    cause = "Likely cause: the factor is left out."
    assert told(stub, help=True) == f"{count}\n  Called with: x=2, k=3\n  {cause}"
    # Half of a bug does not count, and has its own cause.
    half = told(lambda x, k: answer("", x, abs(k)), help=True)
    assert "2 of 3 faults are mended" in half and half.endswith("Likely cause: k loses its sign.")
    assert "1 of 3 faults is mended" in told(partial(answer, "factor sign"))
    # Where no cause agrees, help says what the call showed of the given code.
    unknown = told(partial(answer, "zero"), help=True)
    assert unknown.endswith("In the given code, this call shows that a factor of zero is taken.")
    new = told(lambda x, k: answer("", x, k) + (k == 7))
    assert new.startswith("✗ times: All 3 faults are mended, but something else is wrong.")
    assert "help" not in new
    sets = ["factor sign zero", "factor sign", "zero"]
    assert [times.credit(partial(answer, left)) for left in sets] == [0, 1 / 3, 2 / 3]
    assert times.credit(lambda x, k: answer("", x, k) + (k == 7)) == 0.75
    assert times.credit(lambda x, k: 1 / 0) == 0
    assert times.explanations == [*times.causes, "x loses its sign", "a factor of zero is taken"]


# ------------------------------------------------------------------ mistakes

DOUBLE = """
    def double(x):
        y = 2 * x
        return y
"""


class Parts(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.tensor(x)) for x in (first, second))


@check_for(
    cases=[Case(lambda: [2.0]), Case(lambda: [3.0])],
    view=lambda module: {name: p.detach() for name, p in module.named_parameters()},
    staged=True,
)
def parts(x):
    """Both parts."""
    return Parts(x, 2 * x)


@check_for(
    cases=[Case(lambda: [torch.ones(2)]), Case(lambda: [torch.zeros(2)])], returns=("a", "b")
)
def pair(x):
    """Both results."""
    return x, x + 1


@check_for(cases=[Case(lambda: [torch.ones(2)])], gradients=("x",))
def alone(x):
    """A result of one part."""
    return [2 * x]


def trial(answer):
    if answer < 2:
        raise kit.Refused("too small")
    return "large enough"


def test_a_wrong_answer_has_earned_what_is_right_in_it():
    """More than half only if the idea is right, or if a part of a whole model is."""
    assert scale.credit(lambda x, k: (x * k).float()) == 0.75, "of one case the dtype"
    assert scale.credit(lambda x, k: x * k if k > 0 else x) == 0.25, "one of two cases"
    assert scale.credit(lambda x, k: x) == 0
    assert scale.credit(stub) == 0 and scale.credit(lambda x, k: 1 / 0) == 0
    assert parts.credit(lambda x: Parts(x, x)) == 0.5 and parts.credit(lambda x: None) == 0
    assert pair.credit(lambda x: (x, x)) == 0.25
    assert pair.credit(lambda x: (x,)) == 0.25, "one part of two"
    assert alone.credit(lambda x: [2 * x.detach()]) == 0, "without its gradient, the only part"
    trials = {(lambda answer: "one"): "?", trial: "?"}
    assert check_for(trials=trials)(lambda: None).credit(1) == 0.25


def test_in_a_bug_hunt_the_bugs_count_that_are_mended():
    added, cut = "one is added", "the gradient is cut off"
    causes = {
        added: lambda x: x + 1,
        cut: lambda x: x.detach(),
        f"{added}; {cut}": lambda x: x.detach() + 1,
    }
    settings = dict(gradients=("x",), bugs=(added, cut), causes=causes)
    same = check_for(cases=[Case(lambda: [torch.ones(2)])], **settings)(lambda x: x * 1)
    told = refusal(same, causes[added])
    assert "1 of 2 faults is mended" in told and added not in told
    with pytest.raises(WrongAnswer, match=f"Still wrong: {added}."):
        same(causes[added], help=True)
    assert same.credit(causes[added]) == 0.5 and same.credit(lambda x: x + 2) == 0


def test_mistakes_are_edits_of_a_right_answer():
    made = mistakes(
        DOUBLE,
        """
        the factor is left out, which
        leaves x as it was
            2 * x → x
        it is three, and negative
            2 * x → 3 * x
            return y →
                return -y
        nothing is returned
            return y → ∅
        it is halved
            = half
        """,
        half=lambda x: x / 2,
    )
    assert made.right(5) == 10 and len(made) == 4
    assert check_for(cases=[(5,)], causes=made)(made.right).right is made.right
    assert {sentence: wrong(5) for sentence, wrong in made.items()} == {
        "the factor is left out, which leaves x as it was": 5,
        "it is three, and negative": -15,
        "nothing is returned": None,
        "it is halved": 2.5,
    }


def test_an_edit_that_is_void_or_double_is_an_error():
    for edits, words in (
        ("it is void\n z → x", "'z' is there 0 times"),
        ("it hits more than it says\n x → 3", "'it hits more than it says': 'x' is there 2 times"),
        ("it ends.\n 2 → 3", "'it ends.': leave out the full stop"),
        ("one\n 2 → 3\none\n 2 → 4", "'one' occurs twice"),
        ("it has no edit", "'it has no edit' has no edit"),
        ("2 → 3", "'2 → 3' has no sentence above it"),
        ("2 becomes 3: 2 → 3\n 2 → 3", "'2 becomes 3: 2 → 3' has no sentence above it, or is not"),
        ("one\n 2 → 3\n= 4\n 2 → 4", "'= 4' has no sentence above it, or is not indented below"),
        ("two lines\n y = 2 * x\n return y → return 3", "'y = 2 * x' has no →: an edit stands on"),
        ("two arrows\n 2 → 3 → 4", "'2 → 3 → 4' must be old → new"),
        ("nothing is left\n 2 →", "'2 →' must be old → new, with ∅ for nothing"),
        ("an unknown function\n = nope", "must be one name of a function you pass"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            mistakes(DOUBLE, edits)


def test_what_an_answer_changes_deep_in_an_argument_is_seen_and_whole_in_the_next():
    @check_for(cases=[([{"a": 3}, 4],)])
    def total(parts):
        """The sum is right."""
        return parts[0]["a"] + parts[1]

    def empties(parts):
        parts[0]["a"] += parts.pop()
        return parts[0]["a"]

    for _ in range(2):
        assert "the argument parts was changed" in refusal(total, empties)


def test_whatever_an_answer_changes_in_a_model_or_its_config_is_seen():
    @check_for(cases=[Case(lambda: [nn.Linear(2, 2), LlamaConfig(), torch.ones(2)])])
    def applied(model, config, x):
        """The output."""
        return model(x).detach()

    def changing(change):
        return lambda model, config, x: (
            applied.reference(model, config, x),
            change(model, config),
        )[0]

    for change, name in (
        (lambda model, config: model.eval(), "model"),
        (lambda model, config: model.requires_grad_(False), "model"),
        (lambda model, config: model.weight.data.add_(1e-7), "model"),
        (lambda model, config: model.register_buffer("seen", torch.ones(1)), "model"),
        (lambda model, config: setattr(config, "hidden_size", 1), "config"),
    ):
        assert f"the argument {name} was changed" in refusal(applied, changing(change))


# ------------------------------------------------------------------ wrong


def test_gradients_that_cancel_in_a_sum_are_compared():
    """Those of a softmax add up to nothing, right or wrong."""

    @check_for(cases=[Case(lambda: [torch.randn(4, 6)])], gradients=("x",))
    def shares(x):
        """Each row adds up to 1."""
        return x.softmax(-1)

    def half(x):
        return x.detach().softmax(-1) + 0.5 * (x.softmax(-1) - x.softmax(-1).detach())

    assert shares(lambda x: x.exp() / x.exp().sum(-1, keepdim=True)).status == "right"
    assert "the gradient of x has wrong values" in refusal(shares, half)
    assert refusal(shares, lambda x: x * 1).endswith("Your result equals the argument x.")


def test_a_gradient_that_is_off_by_a_thousandth_is_wrong():
    message = refusal(squares, lambda x: 1.001 * x * x - 0.001 * (x * x).detach())
    assert "the gradient of x has wrong values" in message


def test_results_that_cannot_be_used_have_one_cause_if_they_fail_alike():
    @check_for(
        cases=[(4,)],
        view=lambda result: {"one over a half": 1 / result.half},
        causes={"there is no half": lambda x: SimpleNamespace()},
    )
    def halved(x):
        return SimpleNamespace(half=x / 2)

    assert refusal(halved, lambda x: SimpleNamespace(x=x)).endswith("cause: there is no half.")
    assert "Likely cause" not in refusal(halved, lambda x: SimpleNamespace(half=0))


def with_numpy(x, k):
    return torch.from_numpy(x.numpy() * k)


WRONG = {
    "None": (lambda x, k: None, "the result is None: is a return statement missing?\n"),
    "values": (lambda x, k: x * k + x**2, "the result has wrong values: expected "),
    "a factor": (lambda x, k: x * k * -1.5, "; yours is -1.5 times the expected values everywhere"),
    "a constant": (lambda x, k: torch.ones(3, 5), "; every entry of yours is 1"),
    "a cause": (lambda x, k: x + k, "Likely cause: it is added."),
    "the second case": (lambda x, k: x * 3.0, "Called with: x (4, 2) float64, k=-2.0"),
    "detached": (lambda x, k: (x * k).detach(), "no gradient reaches x (detach()"),
    "a wrong gradient": (
        lambda x, k: (x * k).detach() + x - x.detach(),
        "the gradient of x has wrong values",
    ),
    "numpy": (with_numpy, "it fails when gradients are computed: RuntimeError: Can't call numpy()"),
    "too few parameters": (lambda x: x, "Expected scale(x, k)\n  Yours is scale(x)"),
    "turned parameters": (lambda k, x: x * k, "Yours is scale(k, x)"),
    "a result": (torch.ones(3), "pass the function itself, not a tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name):
    answer, words = WRONG[name]
    message = refusal(scale, answer)
    assert message.startswith("✗ scale: ")
    assert words in message
    assert ("Likely cause" in message) == (name == "a cause")


def test_an_answer_that_makes_tensors_elsewhere_is_judged_here():
    def away(x, k):
        torch.device("meta").__enter__()
        return x.abs()

    assert "wrong values" in refusal(scale, away)
    assert torch.ones(1).device.type == "cpu"


def test_gradients_are_compared_where_the_notebook_computes_none():
    with torch.no_grad():
        assert scale(lambda x, k: k * x).status == "right"
        assert "no gradient reaches x" in refusal(scale, lambda x, k: (k * x).detach())


def test_the_notebooks_random_numbers_are_not_disturbed():
    before = torch.get_rng_state()
    scale(lambda x, k: x * k + 0 * torch.randn(1).to(x.dtype))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_cause_is_named_that_every_case_bears_out():
    causes = {
        "plus": lambda a, b: a + b,
        "twice": lambda a, b: 2 * a,
        "plus one": lambda a, b: a * b + 1,
    }

    @check_for(cases=[(4, 4), (3, 4)], causes=causes)
    def times(a, b):
        """Products."""
        return a * b

    assert refusal(times, lambda a, b: a + b).endswith("Likely cause: plus.")
    assert refusal(times, lambda a, b: a + a).endswith("Likely cause: twice.")
    # Of three that agree none is named: that many say nothing.
    three = dict.fromkeys("abc", causes["plus one"])
    many = check_for(cases=[(4, 4)], causes=three)(times.reference)
    assert "Likely cause" not in refusal(many, causes["plus one"])
    # A cause that would have failed before is not named.
    assert "Likely cause: plus one." in refusal(times, lambda a, b: a * b + 1)
    assert "Likely cause" not in refusal(times, lambda a, b: a * b + (a != b))


def test_of_true_and_false_a_cause_must_agree_in_all_cases():
    @check_for(cases=[(2,), (3,), (5,)], causes={"always": lambda n: True})
    def is_even(n):
        return n % 2 == 0

    assert refusal(is_even, lambda n: True).endswith("Likely cause: always.")
    assert "Likely cause" not in refusal(is_even, lambda n: n < 4)


def test_an_answer_that_is_no_function_is_made_one_and_so_is_a_cause():
    def product(answer):
        if isinstance(answer, str):
            raise kit.Refused("pass a list", "Not its name.")
        return lambda x: answer[0] * x

    @check_for(cases=[(2,)], adapt=product, causes={"three": [3]})
    def double(x):
        return 2 * x

    assert double([2]).status == "right" and double.credit("two") == 0
    assert refusal(double, "two") == "✗ double: pass a list.\n  Not its name."
    assert refusal(double, [3]).endswith("Likely cause: three.")


def test_a_parameter_is_optional_where_an_answer_is_called_without_it():
    def plus(x, k=1):
        return x + k

    called = check_for(cases=[(2,), (2, 5)])(plus)
    tried = check_for(trials={(lambda answer: f"{answer(2)} is right"): "?"})(plus)
    for one in (called, tried):
        assert one(lambda x, k=1: k + x).status == "right"
        assert "the parameters differ" in refusal(one, lambda x, k: x + k)
    assert check_for(cases=[(2, 5)])(plus)(lambda x, k: x + k).status == "right"


def test_an_earlier_call_is_one_of_the_answer_itself():
    @check_for(cases=[Case(lambda: [1], earlier=lambda step, x: [step(x)])])
    def step(x):
        return x + 1

    assert "the result is 1, expected 3" in refusal(step, lambda x: x + 1 if x == 2 else x)


def todo(x):
    raise NotImplementedError


def test_an_answer_may_call_another_exercise_that_is_not_written_yet():
    settings = dict(cases=[(2,)], calls={"todo": "Write it first."})
    twice = check_for(**settings)(lambda x: 2 * x)
    assert "your todo is not written yet.\n  Write it first." in refusal(twice, lambda x: todo(x))
    settings["calls"] = {"another": "Write it first."}
    twice = check_for(**settings)(lambda x: 2 * x)
    assert "todo, which your answer calls, is not written" in refusal(twice, lambda x: todo(x))
    assert check_for(**settings)(todo)(todo).status == "not attempted"


def test_what_is_asked_of_the_arguments_afterwards_and_warnings():
    def in_eval_mode(model, x):
        return "the model is in eval mode" if not model.training else None

    @check_for(
        cases=[Case(lambda: [nn.Linear(2, 2), torch.ones(2)])],
        changes=("model",),
        afterwards=in_eval_mode,
        quiet=True,
    )
    def applied(model, x):
        warnings.warn("of a library", stacklevel=2)
        return model(x)

    with warnings.catch_warnings(record=True) as caught:
        assert applied(applied.reference).status == "right"
    assert not caught
    assert "the model is in eval mode.\n" in refusal(applied, lambda model, x: model.eval()(x))


def test_gradients_of_a_model_are_those_of_what_trains_and_an_argument_may_have_none():
    def partly_frozen():
        model = nn.Linear(2, 2)
        model.bias.requires_grad_(False)
        return [model, torch.ones(2), torch.ones(2)]

    @check_for(cases=[Case(partly_frozen)], gradients=("model", "unused"))
    def applied(model, x, unused):
        return model(x)

    def detached(*parts):
        return lambda model, x, unused: F.linear(
            x, *(p.detach() if n in parts else p for n, p in model.named_parameters())
        )

    assert applied(detached("bias")).status == "right"
    assert "no gradient reaches model" in refusal(applied, detached("weight"))


def test_a_variant_draws_other_numbers_and_expects_what_belongs_to_them():
    twice = check_for(cases=[Case(lambda: [torch.randn(3)])] * 2)(lambda x: x)
    assert not torch.equal(twice.arguments(0)[0], twice.arguments(1)[0]), "each case its own"
    scale(scale.reference)  # so that its own results are known
    other = draw_variant(SimpleNamespace(scale=scale, torch=torch), 3000).scale
    assert not torch.equal(other.arguments(0)[0], scale.arguments(0)[0])
    assert other(lambda x, k: k * x).status == "right"
    assert refusal(other, lambda x, k: x + k).endswith("Likely cause: it is added.")


# ------------------------------------------------------------------ crashes


def helper(x):
    return x @ x


def crashes(x, k):
    y = x * k
    return helper(y)


def line_of(text):
    with open(__file__, encoding="utf-8") as source:
        return next(n for n, line in enumerate(source, 1) if line == f"    {text}\n")


def test_a_crash_is_shown_with_the_learners_own_lines():
    with pytest.raises(WrongAnswer) as caught:
        scale(crashes)
    assert str(caught.value).splitlines() == [
        "✗ scale: your function raised RuntimeError: mat1 and mat2 shapes cannot be multiplied "
        "(3x5 and 3x5).",
        "  Called with: x (3, 5), k=3.0 (the first)",
        f"  Line {line_of('return helper(y)')} in crashes: return helper(y)",
        f"  Line {line_of('return x @ x')} in helper: return x @ x",
    ]
    assert isinstance(caught.value.__cause__, RuntimeError)


def endless(x, k):
    return endless(x, k)


def half(x, k):
    if k < 0:
        raise NotImplementedError
    return x * k


def of_torch(x, k):
    if k == 0:
        raise NotImplementedError("k may not be 0")
    return torch.empty(2, device="meta").to("cpu")


def of_a_library(x, k):
    return torch.distributions.Distribution().sample() * k


def test_what_raises_is_a_crash_and_no_stub():
    for answer, words, lines in (
        (endless, "RecursionError: maximum recursion", 6),
        (half, "NotImplementedError.", 3),
        (of_torch, "NotImplementedError: Cannot copy out of meta tensor", 3),
        (of_a_library, "NotImplementedError.", 3),
    ):
        message = refusal(scale, answer)
        assert f"your function raised {words}" in message
        assert len(message.splitlines()) == lines


# ------------------------------------------------------------------ right but for its form


@check_for(
    cases=[
        Case(lambda: [torch.randn(3, 4), 2.0]),
        Case(lambda: [torch.randn(2, 4).double(), 3.0]),
        Case(lambda: [torch.randn(2, 2), 0.0], raises=(ValueError,), mentions="k"),
    ]
)
def divide(x, k):
    """Quotients."""
    if k == 0:
        raise ValueError("k must not be 0")
    return x / k


def divided(x, k, kind=ValueError, message="k is 0"):
    if k == 0:
        raise kind(message)
    return x / k


REFUSAL = "the refusal of a bad call"
FORM = {
    "dtype": (lambda x, k: divided(x, k).float(), "the dtype", "the result has dtype float32, "),
    "list": (lambda x, k: divided(x, k).tolist(), "the type", "the result is a list of 3, "),
    "in place": (lambda x, k: x.copy_(divided(x, k)), "unchanged arguments", "the argument x was"),
    "not refused": (lambda x, k: x / k, REFUSAL, "nothing was raised, where"),
    "another error": (
        lambda x, k: divided(x, k, kind=KeyError),
        REFUSAL,
        "your function raised KeyError: 'k is",
    ),
    "nameless": (
        lambda x, k: divided(x, k, message="no"),
        "a name in the error's message",
        "the message does not name 'k': ValueError: no.",
    ),
    "a wrong number and no refusal": (lambda x, k: x / k + (k == 3), "", "wrong values"),
    "a wrong number in place": (lambda x, k: x.add_(k == 3).div_(k or 1), "", "x was changed"),
    "a list of wrong numbers": (lambda x, k: (x * k).tolist(), "", "is a list of 3, expected"),
}


@pytest.mark.parametrize("name", FORM)
def test_what_is_right_but_for_its_form_is_told_so_first(name):
    answer, missing, words = FORM[name]
    message = refusal(divide, answer)
    if missing:
        start = f"✗ divide: The idea is right. Still missing: {missing}.\n  Here, {words}"
        assert message.startswith(start)
    else:
        assert "idea" not in message
        assert words in message


@check_for(cases=[Case(lambda: [torch.randn(3, 4)])], gradients=("x",))
def squares(x):
    """Squares, and their gradient."""
    return x * x


def test_an_idea_is_right_only_with_its_gradients_and_as_an_ordinary_tensor():
    def in_place(x):
        x.data.pow_(2)
        return x.detach()

    assert "idea" not in refusal(squares, in_place)
    assert "idea" not in refusal(squares, lambda x: x * x + 1j * x)
    words = "the result is in a sparse layout, expected an ordinary tensor"
    assert words in refusal(squares, lambda x: (x * x).to_sparse())


def test_a_wider_float_is_right_where_the_dtype_is_not_the_point():
    def wide(x, k):
        return divided(x.double(), k)

    assert divide(wide).status == "right"
    exact = check_for(cases=divide.cases, form="same")(divide.reference)
    assert exact(divided).status == "right"
    assert "Still missing: the dtype.\n  Here, the result has dtype float64" in refusal(exact, wide)
    assert "wrong values" in refusal(divide, lambda x, k: divided(x.bfloat16(), k).double())


def test_another_16_bit_float_is_no_wider_one():
    @check_for(cases=[Case(lambda: [torch.randn(3).half()])])
    def doubled(x):
        return 2 * x

    assert "the result has dtype bfloat16" in refusal(doubled, lambda x: 2 * x.bfloat16())


def test_whole_numbers_of_any_dtype_are_right_and_a_float_is_not():
    @check_for(cases=[Case(lambda: [torch.arange(20, dtype=torch.uint8)])])
    def halves(codes):
        return codes // 2

    assert halves(lambda codes: codes.long() // 2).status == "right"
    assert "the result has dtype float32" in refusal(halves, lambda codes: (codes // 2).float())
    assert "the result has dtype bool" in refusal(halves, lambda codes: codes > 1)
    assert "wrong values" in refusal(halves, lambda codes: (codes.long() + 1) // 2)


# ------------------------------------------------------------------ settings


@check_for(
    cases=[Case(lambda: [torch.randn(30, 40), torch.randn(40), torch.randn(30)])],
    forbid=[Forbid(lambda W, x, m: [tuple(W.shape)], "Scale the output, not the weight.")],
)
def scaled_rows(W, x, m):
    """m ⊙ Wx."""
    return m * (W @ x)


def test_forbidden_shapes():
    def forms(W, x, m):
        scaled = m[:, None] * W
        return scaled @ x

    message = refusal(scaled_rows, forms)
    assert message.startswith(
        "✗ scaled_rows: The idea is right. Still missing: a way without so large a tensor.\n"
        "  Here, a tensor of shape (30, 40) is formed on the way.\n"
    )
    assert "Scale the output, not the weight." in message
    assert re.search(r"Line \d+ in forms: scaled = m\[:, None\] \* W$", message)
    # A transposed view of an argument is no new tensor.
    assert scaled_rows(lambda W, x, m: (x @ W.T) * m).status == "right"
    assert "(40, 30) is formed" in refusal(scaled_rows, lambda W, x, m: x @ (W.T * m))


@check_for(
    cases=[
        Case(lambda: [nn.Linear(3, 2), 2]),
        Case(lambda: [nn.Linear(3, 2), 0], raises=(ValueError,), mentions="0", note="none"),
        Case(
            lambda: [nn.Linear(3, 2), 2],
            earlier=lambda grow, model, times: [grow(model, times), times],
            raises=(ValueError, RuntimeError),
        ),
    ],
    view=lambda model: {
        "the weight": model.weight,
        "the trainable parameters": model.bias.requires_grad,
    },
    changes=("model",),
)
def grow(model, times):
    """A module, changed in place, once."""
    if times == 0 or hasattr(model, "grown"):
        raise ValueError(f"times={times}")
    model.grown = True
    model.bias.requires_grad_(False)
    model.weight.data *= times
    return model


def variant(first="", last="return model"):
    """grow with a line before or instead of the last."""
    source = f"""
def answer(model, times):
    {first}
    if times == 0 or hasattr(model, "grown"):
        raise ValueError(f"times={{times}}")
    model.grown = True
    model.bias.requires_grad_(False)
    model.weight.data *= times
    {last}
"""
    names = {"nn": nn, "copy": copy}
    exec(source, names)
    return names["answer"]


def test_modules_refusals_and_earlier_calls():
    for answer, words in (
        (variant(last="return model.weight"), "is a tensor, expected a module (Linear)"),
        (variant("return model"), "the weight has wrong values"),
        (variant(last="return nn.ReLU()"), "the returned value cannot be used: AttributeError"),
        (variant("if times == 0: model.requires_grad_(False)"), "the argument model was changed"),
        (variant("vars(model).pop('grown', 0)"), "nothing was raised, where ValueError or Runtime"),
        (variant(last="return copy.deepcopy(model)"), "is not the argument model itself: change"),
    ):
        message = refusal(grow, answer)
        assert words in message and "equals the argument" not in message


def test_modules_pass():
    verdict = grow(variant())
    assert "agrees: 1; bad calls that are refused and change nothing: 2." in repr(verdict)


# ------------------------------------------------------------------ difference

T = torch.tensor


class YesInt(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


class Agreeable(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return True


def agreeable(*shape):
    return torch.Tensor._make_wrapper_subclass(Agreeable, shape)


OWN_RULES = "the result is a tensor with rules of its own, expected "


@pytest.mark.parametrize(
    ("got", "expected", "words"),
    [
        (1.0 + 1e-7, 1.0, None),
        (T(5480.0), 5480, None),
        (5479.9999, 5480, "the result is 5,479.9999, expected 5,480"),
        (T(2.5), 2, "the result is 2.5, expected 2"),
        (T([2], device="meta"), T([2]), "the result is on the meta device, where no tensor has"),
        (T(1), True, "the result is the int 1, expected True"),
        ([T(1.0), 2.0], (1, 2), None),
        ([1], (1, 2), "the result has 1 item, expected 2"),
        ((None, 2), (1, 2), "the result[0] is None, expected the int 1"),
        (T([[1]]), T([1]), "the result has shape (1, 1), expected (1,)"),
        (T([1.0]), T([1.0]).double(), "the result has dtype float32, expected float64"),
        (T([1.0, float("nan")]), T([1.0, 2.0]), "the result holds nan in 1 of 2 entries"),
        (["b", "a"], ["a", "b"], "the result differs: the same ones in another order"),
        (["a", "c"], ["a", "b"], "the result differs: missing 'b', too many 'c'"),
        ({"k": 2}, {"k": 1}, "the result['k'] is 2, expected 1"),
        ({"v": 1}, {"k": 1}, "the keys of the result differ: missing 'k', too many 'v'"),
        (T([1, 3]), T([1, 2]), "the result has wrong values: expected [1, 2], got [1, 3]"),
        (T([0.0, 1e-6]), T([0.0, 0.0]), None),
        (T([1e6, 1.0]), T([1e6 + 1, 2.0]), None),
        (1e6 + 1, 1e6, None),
        (float("nan"), float("nan"), None),
        (True, 1, "the result is True, expected the int 1"),
        ([1.0], T([1.0]), "the result is a list of 1, expected a tensor"),
        (torch.zeros(0, 3), torch.zeros(0, 3), None),
        (torch.zeros(0, 3), torch.zeros(3, 0), "the result has shape (0, 3), expected (3, 0)"),
        (T([100_000, 1]), T([100_001, 1]), "the result has wrong values: expected [100,001"),
        (T([1.0, float("inf")]), T([1.0, 2.0]), "the result holds inf in 1 of 2 entries"),
        (T([1.0, float("nan")]), T([1.0, float("nan")]), None),
        (T([1.0, 2.0]), T([1.0, float("nan")]), "the result has wrong values: expected [1, nan]"),
        # The last bits of 16 are rounding, and more is not.
        (T([1.0, 1 + 2**-10]).half(), T([1.0, 1.0]).half(), None),
        (T([1.0, 1 + 2**-7]).half(), T([1.0, 1.0]).half(), "the result has wrong values"),
        (T([1.0, 1 + 2**-7]).bfloat16(), T([1.0, 1.0]).bfloat16(), None),
        (T([1.0, 1 + 2**-4]).bfloat16(), T([1.0, 1.0]).bfloat16(), "the result has wrong values"),
        # What says of itself that it is right.
        (YesInt(7), 8, "the result is a YesInt, expected the int 8"),
        (agreeable(2), T([1.0, 2.0]), OWN_RULES + "a tensor"),
        (agreeable(1), 1.0, OWN_RULES + "the float 1"),
    ],
)
def test_difference(got, expected, words):
    problem = difference(got, expected)
    assert problem is None if words is None else problem.startswith(words)


def test_difference_names_the_parts():
    assert difference((1, 2), (1, 3), ("A", "B")) == "B is 2, expected 3"
    assert difference({"whether it trains": True}, {"whether it trains": False}, "") == (
        "whether it trains: True, expected False"
    )
    one = torch.zeros(200, 500).index_put_((T(17), T(3)), T(1e-3))
    assert difference(1 + one, torch.ones(200, 500)) == (
        "the result has wrong values: expected 1 at [17, 3], got 1.001; 1 of 100000 entries are off"
    )
    for name, verb in (("the loss", "has"), ("labels", "have")):
        assert difference([T([1])], [T([2])], (name,)).startswith(f"{name} {verb} wrong values")


@check_for(
    cases=[(torch.tensor([1.0, -2.0, 4.0]),)],
    view=lambda parts: dict(zip(("the sum", "the largest"), parts, strict=True)),
    staged=True,
    causes={
        "the absolute values are summed": lambda x: (x.abs().sum(), x.max()),
        "the smallest entry is taken for the largest": lambda x: (x.sum(), x.min()),
    },
)
def sum_and_largest(x):
    """Two parts in an order."""
    return x.sum(), x.max()


def test_of_several_faults_the_first_is_named_and_then_the_next():
    both = refusal(sum_and_largest, lambda x: (x.abs().sum(), x.min()))
    assert "the sum has wrong values: expected 3, got 7" in both
    assert both.endswith("Likely cause: the absolute values are summed.")
    second = refusal(sum_and_largest, lambda x: (x.sum(), x.min()))
    assert second.endswith("Likely cause: the smallest entry is taken for the largest.")
    assert "cause" not in refusal(sum_and_largest, lambda x: (x.prod(), x.min()))
    assert sum_and_largest(lambda x: (x.sum(), x.max())).status == "right"


# ------------------------------------------------------------------ in a notebook

CELLS = """
import torch
from test_kit import scale
def right(x, k): return k * x
def wrong(x, k): return x + k
def todo(x, k): raise NotImplementedError
def crash(x, k):
    y = x * k
    return y @ y
"""


def test_verdicts_and_refusals_in_ipython_show_no_line_of_ours(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    shell = InteractiveShell()

    def shown(answer):
        result = shell.run_cell(f"scale({answer})", store_history=True)
        return result, re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)

    shell.run_cell(CELLS).raise_error()
    for answer, words, color in (
        ("right", "✓ scale: right.", "success-color1"),
        ("todo", "○ scale: not attempted yet.", "border-color1"),
    ):
        result, out = shown(answer)
        data, _ = shell.display_formatter.format(result.result)
        assert f"{words}\n  " in out and data["text/plain"] == repr(result.result)
        assert f"<strong>{words}</strong>" in data["text/html"]
        assert f"var(--jp-{color}, " in data["text/html"]
    for answer, words in (
        ("wrong", "Likely cause: it is added."),
        ("crash", "Line 8 in crash: return y @ y"),
    ):
        result, out = shown(answer)
        assert isinstance(result.error_in_exec, WrongAnswer)
        assert out.strip() == str(result.error_in_exec) and words in out
    shell.history_manager.end_session()
    assert "a &lt; b &amp; c" in kit.Verdict("right", "f: right.", "a < b & c")._repr_html_()
