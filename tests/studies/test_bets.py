"""Bets: kept, shown beside their outcome, and refused where they are none."""

import pytest
import torch

from peft_lessons.studies import Bets, figures


@pytest.fixture
def shown(monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "display", shown.append)
    return shown


def test_without_a_guess_the_outcome_is_printed_alone(shown, capsys):
    bets = Bets()
    assert repr(bets) == "no bet has been shown yet" and bets._repr_html_() is None
    bets.show("accuracy of rank 1", None, 62.7, "%")
    assert "came out as 62.7 %" in capsys.readouterr().out and not shown
    assert "62.7 %" in repr(bets) and "No guess was entered" in repr(bets)


@pytest.mark.parametrize("guess", [75, 75.0, torch.tensor(75)])
def test_a_guess_is_kept_with_its_distance(shown, guess):
    bets = Bets()
    bets.show("accuracy of rank 1", guess, 62.7, "%")
    assert "outcome 62.7 %, your guess 75.0 %" in shown[0].alt
    assert "12.3 points" in repr(bets) and "No guess" not in repr(bets)
    assert "<td" in bets._repr_html_()


def test_a_bet_shown_again_replaces_the_old_one(shown):
    bets = Bets()
    bets.show("rank", 2, 4, digits=0)
    bets.show("rank", 3, 4, digits=0)
    assert repr(bets).count("rank") == 1 and repr(bets).endswith("1")


def test_a_choice_is_right_or_wrong(shown):
    bets, choices = Bets(), ("head alone", "LoRA")
    bets.show("which wins", " lora", "LoRA", choices=choices)
    bets.show("which loses", "LoRA", "head alone", choices=choices)
    right, wrong = repr(bets).splitlines()[1:]
    assert right.endswith("right") and wrong.endswith("wrong")


@pytest.mark.parametrize("guess", ["75 %", float("nan"), float("inf"), True, [1, 2]])
def test_what_is_no_number_is_refused_and_not_kept(shown, guess):
    bets = Bets()
    with pytest.raises(ValueError, match="'accuracy'.* must be a number"):
        bets.show("accuracy", guess, 62.7)
    assert repr(bets) == "no bet has been shown yet" and not shown


def test_what_is_no_choice_is_refused_with_the_choices(shown):
    with pytest.raises(ValueError, match="'DoRA' must be one of head alone, LoRA"):
        Bets().show("which wins", "DoRA", "LoRA", choices=("head alone", "LoRA"))
