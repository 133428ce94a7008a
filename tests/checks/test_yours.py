"""`yours`: the reader's function goes on once its check has passed, the course's until then."""

import types

import pytest

from peft_lessons import check
from peft_lessons.checks import yours
from peft_lessons.checks.check import Check


@pytest.fixture(autouse=True)
def fresh_kernel(monkeypatch):
    monkeypatch.setattr(check.lora.compress_lora, "passed", None)


def named(function):
    return types.FunctionType(function.__code__, function.__globals__, "compress_lora")


def test_until_its_check_has_passed_the_course_s_function_goes_on(capsys):
    mine = named(lambda A, B, rank: (A[:rank], B[:, :rank]))
    with pytest.raises(check.WrongAnswer):
        check.lora.compress_lora(mine)
    assert yours(mine) is check.lora.compress_lora.right
    assert "the course's" in capsys.readouterr().out


def test_a_function_that_passed_goes_on_and_one_written_later_does_not(capsys):
    right = check.lora.compress_lora.right

    def compress_lora(A, B, rank):
        return right(A, B, rank)

    check.lora.compress_lora(compress_lora)
    assert yours(compress_lora) is compress_lora
    assert "yours, which passed" in capsys.readouterr().out
    assert yours(named(lambda A, B, rank: None)) is right


def test_what_is_no_exercise_is_refused():
    with pytest.raises(ValueError, match="no exercise has a function 'len'"):
        yours(len)


def test_no_two_lessons_have_an_exercise_of_one_name():
    modules = [getattr(check, name) for name in check.__all__]
    names = [n for m in modules for n, one in vars(m).items() if isinstance(one, Check)]
    assert len(names) == len(set(names)) > 50
