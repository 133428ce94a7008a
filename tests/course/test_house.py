"""The rooms of the house: which may import which, as docs/architecture.md says, and what no room
does."""

import ast
import json
import re
from pathlib import Path

import pytest

import peft_lessons
from peft_lessons.engine import registered_methods
from tools.environment import ROOT

PACKAGE = ROOT / "peft_lessons"
OUTSIDE = {"benchmarks", "classroom", "tests", "tools"}


def sources(folder):
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def imported(path):
    """Return the absolute names of the modules that a file imports, at the top or in a function."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*parts, node.module] if node.module else parts)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def room_of(name):
    """Return the room of a module of the package, None for another one."""
    parts = name.split(".")
    return parts[1] if parts[0] == "peft_lessons" and len(parts) > 1 else None


def table():
    """Return {room: the rooms that it may import}, as docs/architecture.md lists them."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| `(\w+)(?:/|\.py)` \| .* \| ([\w, ]+) \|$", text)
    return {room: set() if rooms == "nothing" else set(rooms.split(", ")) for room, rooms in rows}


def arrows():
    """Return {room: the rooms that it imports}."""
    found = {}
    for path in sources("peft_lessons"):
        room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if room not in ("__init__", "_quiet"):
            rooms = set(filter(None, map(room_of, imported(path)))) - {room, "_quiet"}
            found[room] = found.get(room, set()) | rooms
    return found


def test_the_page_lists_the_rooms_and_what_each_imports():
    assert arrows() == table()


def test_the_drawing_has_an_arrow_for_each_import():
    svg = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    names = re.findall(r'class="name" x="(\d+)" y="(\d+)">(\w+)', svg)
    boxes = re.findall(r'class="box" x="(\d+)" y="(\d+)" width="(\d+)" height="(\d+)"', svg)
    at = {(int(x) - 12, int(y) - 21): name for x, y, name in names}

    def room(x, y, edge):  # whose box has this point on its upper (0) or lower (1) edge
        sides = [map(int, box) for box in boxes]
        return next(at[a, b] for a, b, w, h in sides if a <= x <= a + w and y == b + edge * h)

    drawn = {}
    for line in re.findall(r'class="arrow" d="M(\d+) (\d+) L(\d+) (\d+)"', svg):
        x, y, to_x, to_y = map(int, line)
        drawn.setdefault(room(x, y, 1), set()).add(room(to_x, to_y, 0))
    assert drawn == {room: rooms for room, rooms in arrows().items() if rooms}


def test_no_room_imports_one_above_it():
    left = table()
    while left:
        lowest = {room for room, rooms in left.items() if not rooms & left.keys()}
        assert lowest, f"these rooms import one another in a circle: {sorted(left)}"
        left = {room: rooms for room, rooms in left.items() if room not in lowest}


@pytest.mark.parametrize(
    ("folder", "never"),
    [
        ("peft_lessons", OUTSIDE),
        ("tools", {"benchmarks", "classroom", "tests"}),
        ("classroom", {"benchmarks", "tests"}),
        ("benchmarks", {"classroom", "tests", "tools"}),
        ("notebooks", OUTSIDE),
        ("data", OUTSIDE),
    ],
)
def test_a_folder_never_imports(folder, never):
    files = [path for path in sources(folder) if "tests" not in path.relative_to(ROOT).parts]
    wrong = {
        p.name: names for p in files if (names := {n.split(".")[0] for n in imported(p)} & never)
    }
    assert files and not wrong


def names_in(path):
    """Return the names that the code of a file uses, without its strings and comments."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {getattr(node, "id", None) or getattr(node, "attr", None) for node in nodes}


@pytest.mark.parametrize("room", ["engine", "data", "train", "studies", "costs", "hf"])
def test_a_room_that_serves_all_methods_names_none(room):
    methods = {method.__name__ for method in registered_methods()}
    named = {
        p.name: used for p in sources(f"peft_lessons/{room}") if (used := names_in(p) & methods)
    }
    assert len(methods) > 15 and not named


def test_studies_train_nothing_and_change_no_model():
    verbs = {
        "fit",
        "inject",
        "merge",
        "save_adapter",
        "train_step",
        "write_atomically",
        "write_text",
    }
    assert not {
        p.name: used for p in sources("peft_lessons/studies") if (used := names_in(p) & verbs)
    }


def test_a_lesson_exports_nothing_and_imports_neither_tools_nor_tests():
    for path in sorted(Path(ROOT, "notebooks").glob("[0-9]*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        assert not [source for source in code if source.startswith("#|")], path.name
        lines = re.findall(r"(?m)^\s*(?:from|import) (\w+)", "\n".join(code))
        assert not OUTSIDE & {*lines}, path.name


def test_a_lesson_needs_few_names_and_each_is_there():
    assert len(peft_lessons.__all__) == len(set(peft_lessons.__all__)) <= 52
    assert all(hasattr(peft_lessons, name) for name in peft_lessons.__all__)


def test_each_file_of_tests_has_a_name_of_its_own():
    """Two of one name can't be collected together, which a run of one folder doesn't show."""
    names = [path.name for folder in ("tests", "classroom/tests") for path in sources(folder)]
    tests = [name for name in names if name.startswith("test_")]
    assert len(tests) > 50 and len(tests) == len(set(tests))
