"""The students' copy has all that a lesson needs, and no answers."""

import zipfile

import pytest

from tools import notebooks, release
from tools.environment import offline_environment


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "peft-lessons"
    return folder, release.release(folder)


def test_no_solution_is_in_it(copied):
    folder, _ = copied
    texts = {
        p: p.read_text(encoding="utf-8")
        for p in folder.rglob("*")
        if p.suffix in {".py", ".ipynb", ".md"}
    }
    assert not [p for p in folder.rglob("*") if "solutions" in p.name or "tests" in p.name]
    for path in notebooks.lessons():
        for name, source in notebooks.read_solutions(path).items():
            last = source.splitlines()[-1]
            body = source.partition('"""\n')[2] or last
            assert not [p for p, text in texts.items() if body in text], name


def test_exercises_and_checks_have_no_outputs_and_the_rest_is_as_it_was(copied):
    folder, _ = copied
    for path in notebooks.lessons():
        ours, theirs = notebooks.read(path), notebooks.read(folder / "notebooks" / path.name)
        assert ours.metadata == theirs.metadata
        for mine, his in zip(ours.cells, theirs.cells, strict=True):
            if {"exercise", "check"} & set(notebooks.tags(mine)):
                assert mine.source == his.source and not his.outputs
            else:
                assert mine == his


def test_it_runs_by_itself(copied):
    folder, _ = copied
    env = offline_environment({"PATH": "/usr/bin:/bin"}) | {"PYTHONPATH": str(folder)}
    path = folder / "notebooks" / "00_start_here.ipynb"
    nb = notebooks.read(path)
    nb.cells.append(nb.cells[-1].copy())
    nb.cells[-1].update(source="import peft_lessons; peft_lessons.__file__", id="where")
    done = notebooks.execute(nb, path.parent, env)
    assert str(folder) in done.cells[-1].outputs[0].data["text/plain"]


def test_the_archive_holds_the_folder(copied):
    names = zipfile.ZipFile(copied[1]).namelist()
    assert all(name.startswith("peft-lessons/") for name in names)
    assert {"peft-lessons/notebooks/14_beyond_lora.ipynb", "peft-lessons/Makefile"} <= set(names)


def test_it_has_the_notices_and_the_rule_for_line_ends(copied):
    # An instructor may put the copy into a repository, which somebody clones on Windows.
    names = set(zipfile.ZipFile(copied[1]).namelist())
    assert {f"peft-lessons/{name}" for name in (".gitattributes", "LICENSE", "NOTICE")} <= names


def test_a_folder_of_something_else_is_kept(tmp_path):
    (tmp_path / "thesis").touch()
    with pytest.raises(ValueError, match="holds something else"):
        release.release(tmp_path)
    assert (tmp_path / "thesis").exists()


def test_a_second_copy_replaces_the_first(copied):
    folder, _ = copied
    (folder / "notebooks" / "mine.ipynb").touch()
    release.release(folder)
    assert not (folder / "notebooks" / "mine.ipynb").exists()
