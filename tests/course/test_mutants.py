"""The list of one-line faults fits the code. `make mutants` tells which test notices each."""

import pytest

from tools.environment import ROOT
from tools.mutants import MUTANTS, main


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_fault_changes_one_place_and_names_its_tests(mutant):
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    assert mutant.old != mutant.new
    assert all((ROOT / path).is_file() for path in mutant.tests.split())


@pytest.mark.every_lesson
def test_every_fault_is_noticed():
    assert len(MUTANTS) >= 30
    assert main(()) == 0
