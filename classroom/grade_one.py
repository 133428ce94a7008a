"""Run one student's notebook and judge its answers: the process that classroom.grade starts.

    python -m classroom.grade_one NOTEBOOK LESSON SECONDS MEMORY VARIANT SKIP

Writes lines to standard output: what it is about to do, the limits that this system could set, what
it finds in the student's cells, and the outcome of each exercise. They carry the word that stands
on standard input, so that nothing printed by accident is taken for one, and spell all else in hex:
that takes no function that a notebook could replace.

SKIP names, by commas, what an earlier process hung or died of: numbers of cells, and exercises,
those too that are judged already. With "cells" among them only what defines something is run.

The notebook sees nothing of the checks, so that it can neither ask nor change them.
"""

import ast
import builtins
import ctypes
import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

try:
    import resource
except ImportError:  # on Windows
    resource = None

# jsonschema, which nbformat imports, would build a grammar of addresses for a second and a half.
sys.modules.setdefault("rfc3987_syntax", None)

from IPython.core.interactiveshell import InteractiveShell  # noqa: E402
from nbformat import NotebookNode  # noqa: E402
from traitlets.config import Config  # noqa: E402

from tools import notebooks  # noqa: E402
from tools.environment import ROOT  # noqa: E402

LARGEST_FILE = 2**28
TROUBLE = 75  # the status of a process that could not say what it found
MOST_TEXT = 2000  # characters of a text, or of what is said of an answer
MOST_TEXTS = 100_000  # characters of all texts
MOST_ODD = 20  # cells that are named
CHECKS = "peft_lessons.checks"
PACKAGE = ROOT / "peft_lessons"
CLASSROOM = ROOT / "classroom"
DEVICES = ("null", "zero", "random", "urandom")
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/proc", "/sys")
SYSTEM += tuple(f"/etc/{name}" for name in (
    "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "timezone", "passwd", "group",
    "hosts", "nsswitch.conf", "resolv.conf", "mime.types", "os-release", "fonts", "ssl",
    "alternatives",
))  # fmt: skip
# The plumbing of lesson 15 that defined its exercises' names, in copies until November 2026: hashes
# of the sources.
EARLIER = {"be4312c256f6b8d9", "f602f55528d356aa", "483f4786e2ab56e2"}
EARLIER |= {"338f9f37f4fe3301", "eea366e858e10854", "3ee5c53ba57dbb2a"}
# What an answer has no business with: cells with such words are named for a look by eye.
ODD = re.compile("|".join((
    r"\bgc\s*\.\s*get", r"from\s+gc\b", r"import\s+gc\s+as", "ctypes", r"sys\s*\.\s*modules",
    "__mp_main__", r"import\s+__main__", r"\binspect\b", "tracemalloc", "linecache", "builtins",
    "_getframe", "_current_frames", "walk_stack", "f_back", "f_locals", "f_globals", "tb_frame",
    "gi_frame", "settrace", "setprofile", r"\bsetattr\s*\(", "set_default_device",
    "TorchFunctionMode", r"__torch_\w+__", r"torch\s*\.\s*library", "__eq__", "__subclasses__",
    "__globals__", "__closure__", "__self__", "__dict__", "__import__", "grade_one", "solutions",
    r"__enter__\s*\(", r"\bvars\s*\(", r"mock\s*\.\s*patch", r"\bfork\b", r"os\s*\.\s*kill",
    "prlimit", "ftruncate", r"_exit\b",
)))  # fmt: skip
SMALL = 20  # nodes of a syntax tree: shorter answers are equal by chance


class TimedOut(BaseException):
    """Not an Exception, so that `except Exception` in an answer does not catch it."""


ARMED = False  # an alarm can come when its block has just ended


def _alarm(signum, frame):
    if ARMED:
        raise TimedOut


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimedOut in the block after some seconds: by the system's alarm, and on Windows, which
    has none, by a thread, between two steps of Python."""
    if not hasattr(signal, "setitimer"):
        here, late = ctypes.c_ulong(threading.get_ident()), ctypes.py_object(TimedOut)
        stop = ctypes.pythonapi.PyThreadState_SetAsyncExc
        timer = threading.Timer(seconds, stop, (here, late))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            stop(here, None)
        return
    global ARMED
    ARMED = True
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        ARMED = False
        signal.setitimer(signal.ITIMER_REAL, 0)


def confine(folder: Path, memory: float) -> list[str]:
    """From here on this process and its children write to `folder` alone, read the course (not its
    solutions and checks), Python and the system's files, and hold at most `memory` GiB. Return
    which of "memory", "file size", "files" and "signals" this system could limit.

    Raises RuntimeError if there is another thread, which would stay free."""
    kernel_holds = has_landlock()
    if kernel_holds and len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("confine: there is more than one thread, and only this one is held")
    limits = {"DATA": int(memory * 2**30), "FSIZE": LARGEST_FILE, "CORE": 0} if resource else {}
    held = []
    for name, most in limits.items():
        with suppress(ValueError, OSError, AttributeError):  # macOS refuses that of memory
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
            held += {"DATA": ["memory"], "FSIZE": ["file size"]}.get(name, [])
    if not kernel_holds:
        return held
    from landlock import FSAccess, Ruleset

    file = FSAccess.EXECUTE | FSAccess.READ_FILE
    parts = [path for path in PACKAGE.iterdir() if path.name != "checks"]
    parts += [path for path in CLASSROOM.iterdir() if path.name != "tests"]
    course = [ROOT / "data", ROOT / "tools", *(path for path in parts if path.is_dir())]
    places = [path for path in [*course, *opened()] if path.exists()]
    rules = Ruleset()
    rules.allow(*(p for p in places if p.is_dir()), rules=file | FSAccess.READ_DIR)
    rules.allow(*(p for p in places if not p.is_dir()), rules=file)
    rules.allow(*(path for path in parts if path.is_file()), rules=file)
    # Without it nothing in them can be imported.
    rules.allow(PACKAGE, CLASSROOM, rules=FSAccess.READ_DIR)
    files = FSAccess.READ_FILE | FSAccess.WRITE_FILE
    rules.allow(*(Path("/dev") / name for name in DEVICES), rules=files)
    rules.allow(folder)
    rules.apply()
    return [*held, "files", *(["signals"] if hold_signals() else [])]


def opened() -> list[Path]:
    """Return the folders and files, besides the course's, that notebooks may read."""
    return [Path(place) for place in (*SYSTEM, sys.prefix, sys.base_prefix)]


def hold_signals() -> bool:
    """From here on let this process and its children signal none but each other, by Landlock from
    version 6 on (Linux 6.12), of which the package landlock knows no word; return whether it
    holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    create, restrict = 444, 446  # the same numbers on every processor
    # No rights of files, none of the network, and both scopes: abstract sockets and signals.
    ruleset = (ctypes.c_uint64 * 3)(0, 0, 3)
    handle = libc.syscall(create, ruleset, ctypes.sizeof(ruleset), 0)
    if handle < 0:  # an older kernel knows no third field
        return False
    held = libc.syscall(restrict, handle, 0) == 0
    os.close(handle)
    return held


def has_landlock() -> bool:
    if sys.platform != "linux":
        return False
    from landlock import landlock_abi_version

    with suppress(OSError):
        return landlock_abi_version() > 0
    return False


class Unchecked:
    """Take the place of the checks, and of what they return, while a student's notebook runs: each
    name in one is another one, and nothing can be computed with it. Only `yours`, which may ask
    whether an answer has passed, returns what it is given."""

    def yours(self, function: object) -> object:
        return function

    def __getattr__(self, name: str) -> "Unchecked":
        if name.startswith("_"):  # what Python and IPython ask of any object
            raise AttributeError(f"{self!r}: {name}")
        return Unchecked()

    def __call__(self, *args: object, **options: object) -> "Unchecked":
        return Unchecked()

    def __repr__(self) -> str:
        return "not checked here: the marking does it afterwards"


def hidden(module: str, variant: int = 0) -> SimpleNamespace:
    """Return a lesson's module of checks, which draw the inputs of a variant. By its name, and by
    those of all checks, a notebook finds only what does nothing."""
    package = import_module("peft_lessons")
    draw_variant = import_module("peft_lessons.checks.kit").draw_variant
    course = draw_variant(getattr(package.check, module), variant)
    nothing = Unchecked()
    sys.modules.update({name: nothing for name in sys.modules if name.startswith(CHECKS)})
    package.check = package.checks = nothing
    return course


class Shell(InteractiveShell):
    """Run cells as JupyterLab does: with magics that need no terminal and no window."""

    system = InteractiveShell.system_raw

    def enable_gui(self, gui: str | None = None) -> None:
        pass


def new_shell() -> InteractiveShell:
    config = Config()
    config.HistoryManager.enabled = False
    return Shell.instance(config=config)


# ------------------------------------------------------------------ whose a cell is


def bare(source: str) -> str:
    """Return a source as it is compared: without spaces at the ends of its lines, and without the
    title that a copy for Colab has."""
    lines = [line.rstrip() for line in source.splitlines() if not line.startswith("#@title ")]
    return "\n".join(lines).strip()


class Lesson:
    """Tell the course's cells of a lesson from a student's own."""

    def __init__(self, lesson: str, nb: NotebookNode) -> None:
        self.nb, self.names = nb, notebooks.exercise_names(nb)
        self.texts = {cell.id: cell.source for cell in nb.cells}
        code = [cell for cell in notebooks.code_cells(nb) if "exercise" not in notebooks.tags(cell)]
        self.stubs = {notebooks.exercise_name(c): c.source for c in notebooks.exercise_cells(nb)}
        self.long = {cell.id for cell in code if "long" in notebooks.tags(cell)}
        module = notebooks.MODULES.get(lesson, "")
        self.checked = {
            bare(cell.source): name
            for cell in code
            for name in self.names
            if notebooks.is_check_of(cell, module, name)
        }
        self.calls = {name: f"check.{module}.{name}({name})" for name in self.names}
        # What a hunt's text is once its line that raises is gone.
        self.started = {n: print_of(without_raise(stub), n) for n, stub in self.stubs.items()}
        self._known = {bare(source) for source in (*self.stubs.values(), *(c.source for c in code))}

    def has(self, cell: NotebookNode) -> bool:
        """Return whether a cell is the course's: one in which a student has changed something is
        the student's."""
        return bare(cell.source) in self._known

    def had(self, cell: NotebookNode) -> bool:
        """Return whether a cell is one that the lesson no longer has, of an earlier copy."""
        digest = hashlib.sha256(bare(cell.source).encode(errors="replace")).hexdigest()
        return digest[:16] in EARLIER


def parsed(cell: NotebookNode) -> ast.Module | None:
    """Return the syntax tree of a cell, None if it has none."""
    with suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.parse(notebooks.python(cell))
    return None


def definitions_of(cell: NotebookNode) -> list[str]:
    """Return the statements by which a cell defines or imports something, without what it
    computes."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom

    def defines(node: ast.stmt) -> bool:
        plain = isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.Lambda)
        return plain or isinstance(node, kinds)

    tree = parsed(cell)
    return [ast.unparse(node) for node in tree.body if defines(node)] if tree else [cell.source]


def needed(cell: NotebookNode) -> bool:
    """Return whether exercises need all of a cell: it imports, or has one of their tags."""
    tree = parsed(cell)
    imports = tree and any(isinstance(n, ast.Import | ast.ImportFrom) for n in ast.walk(tree))
    return bool(notebooks.SOLVED & {*notebooks.tags(cell)} or imports)


# ------------------------------------------------------------------ what a student's cells hold


def own_texts(nb: NotebookNode, lesson_cells: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return (the heading above, the text) of each markdown cell of a student's: predictions and
    answers to questions. `lesson_cells` is {id: source} of the lesson's: of one that
    the student has changed, the text is the lines that the lesson does not have."""
    texts, above, sources = [], "", {*lesson_cells.values()}
    for cell in nb.cells:
        if cell.cell_type != "markdown":
            continue
        changed = lesson_cells.get(cell.get("id"))
        title = next((title for _, title in reversed(notebooks.headings(cell))), above)
        known = set() if changed is None else set(changed.splitlines())
        text = "\n".join(line for line in cell.source.splitlines() if line not in known).strip()
        text = text[: min(MOST_TEXT, MOST_TEXTS - sum(len(one) for _, one in texts))]
        if text and cell.source not in sources:
            texts.append((above if changed is None else title, text))
        above = title
    return texts


def odd_cells(nb: NotebookNode, lesson: Lesson) -> list[tuple[int, str]]:
    """Return (number, counted from 1 among all cells, the words found) of each code cell of a
    student's that has something in it with which an answer has no business."""
    odd = []
    trees = {id(cell): parsed(cell) for cell in notebooks.code_cells(nb)}
    aliases = {"torch"}
    for node in (n for tree in filter(None, trees.values()) for n in ast.walk(tree)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            aliases |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign) and rooted(node.value, aliases):
            aliases |= {name.id for name in node.targets if isinstance(name, ast.Name)}
    for number, cell in enumerate(nb.cells, 1):
        if cell.cell_type == "code" and not lesson.has(cell):
            # What the exercise's own text has is no word of the student's.
            words = {*ODD.findall(cell.source)} - {*ODD.findall("\n".join(lesson.stubs.values()))}
            words |= replaced(trees[id(cell)], aliases)
            if words:
                odd.append((number, ", ".join(sorted(words))[:200]))
    return odd[:MOST_ODD]


def rooted(node: ast.expr, names: set[str]) -> bool:
    """Return whether an expression is a part of something with one of these names, or a type."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "type"
    if not isinstance(node, ast.Name | ast.Attribute):
        return False
    return ast.unparse(node).split(".")[0] in names


def replaced(tree: ast.Module | None, modules: set[str]) -> set[str]:
    """Return what of modules, by the names that a notebook gives them, a cell replaces; PyTorch's
    settings in torch.backends are no such thing."""
    assigned = set()
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            name = ast.unparse(node)
            if name.split(".")[0] in modules and not name.startswith("torch.backends."):
                assigned.add(f"{name} =")
    return assigned


class _Bare(ast.NodeTransformer):
    """Take from a function what can be changed without a thought: names, annotations, texts that
    explain."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def _name(self, name: str) -> str:
        return self.names.setdefault(name, f"name{len(self.names)}")

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self._name(node.id), node.ctx)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(self._name(node.arg))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node = self.generic_visit(node)
        return ast.Assign([node.target], node.value) if node.value else ast.Pass()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns, node.body = None, [n for n in node.body if not _explains(n)] or [ast.Pass()]
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.body = [n for n in node.body if not _explains(n)] or [ast.Pass()]
        return self.generic_visit(node)


def _explains(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def print_of(source: str, name: str) -> str:
    """Return a hash of an answer's syntax tree, the same if only names, spaces and comments differ;
    "" for an answer that is too short to tell two students apart."""
    with suppress(SyntaxError, ValueError, RecursionError, MemoryError, KeyError):
        tree = _Bare().visit(notebooks.definitions(source)[name])
        if sum(1 for _ in ast.walk(tree)) >= SMALL:
            return hashlib.sha256(ast.dump(tree).encode(errors="replace")).hexdigest()[:16]
    return ""


def prints(nb: NotebookNode, lesson: Lesson) -> dict[str, str]:
    """Return {exercise: the hash of its answer} of a student's answers; a stub, and a hunt as it
    was handed out, have none."""
    hashes = {}
    for cell in notebooks.code_cells(nb):
        if not lesson.has(cell) and not lesson.had(cell):
            source = notebooks.python(cell) if parsed(cell) else ""
            for name in lesson.names:
                if (one := print_of(source, name)) and one != lesson.started[name]:
                    hashes[name] = one
    return hashes


def without_raise(stub: str) -> str:
    """Return a stub's source as who starts with it has it: without the line that raises."""

    class Started(ast.NodeTransformer):
        def visit_Raise(self, node: ast.Raise) -> ast.AST | None:
            return ast.Pass() if "NotImplementedError" in ast.unparse(node) else node

    return ast.unparse(Started().visit(ast.parse(stub)))


# ------------------------------------------------------------------ run and judge


@dataclass
class Ran:
    """What has become of a notebook's cells: {exercise: the student's object of that name},
    {exercise: what went wrong in the cell that is to define it}, and {exercise: all names as they
    were where the lesson checks it}."""

    answers: dict[str, object] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    spaces: dict[str, dict] = field(default_factory=dict)


def run(
    nb: NotebookNode,
    lesson: Lesson,
    shell: InteractiveShell,
    seconds: float,
    about_to: Callable[[str], None] = lambda what: None,
    skip: Sequence[str] = (),
) -> Ran:
    """Run a student's notebook. An answer is what an exercise's name holds after a cell of the
    student's, whatever the course's cells make of that name."""
    ran, space = Ran(), shell.user_ns
    for number, cell in enumerate(notebooks.code_cells(nb)):
        is_ours, kinds = lesson.has(cell) or lesson.had(cell), {*notebooks.tags(cell)}
        if name := lesson.checked.get(bare(cell.source)):
            ran.spaces[name] = dict(space)
        if (is_ours and {"long", "check"} & kinds) or not cell.source.strip():
            continue
        # Of a cell that ends the process what it defines is run, unless that ends it, too.
        label = f"{number}d" if str(number) in skip else str(number)
        names = re.findall(r"(?m)^(?:def|class)\s+(\w+)", cell.source)
        if label in skip:
            ran.failed |= dict.fromkeys(names, "it hangs, or ends the notebook's process")
            continue
        about_to(label)
        before = {name: space.get(name) for name in lesson.names}
        run_whole = cell.get("id") not in lesson.long and ("cells" not in skip or needed(cell))
        run_whole = run_whole and label == str(number)
        error = ran_of(shell, [cell.source] if run_whole else definitions_of(cell), seconds)
        if run_whole and error and not isinstance(error, TimedOut):
            # A line that works elsewhere only, as google.colab, must not cost the imports.
            ran_of(shell, definitions_of(cell), seconds)
        for name in names:
            ran.failed.pop(name, None)
        if error:
            ran.failed |= dict.fromkeys(names, told_of(error, seconds))
        for name in lesson.names:
            if (new := space.get(name)) is not before[name]:
                # A stub beside an answer, as an update leaves it, takes nothing away.
                stub = is_ours and bare(cell.source) == bare(lesson.stubs[name])
                if not is_ours or (stub and name not in ran.answers):
                    ran.answers[name] = new
        if not is_ours:
            changed = [name for name, call in lesson.calls.items() if call in cell.source]
            ran.spaces |= {name: dict(space) for name in changed}
    return ran


def ran_of(shell: Shell, sources: Sequence[str], seconds: float) -> BaseException | None:
    """Run sources one after another, whatever becomes of each, and return the last error."""
    error = None
    with at_most(seconds):
        for source in sources:
            result = shell.run_cell(source, store_history=False)
            error = result.error_before_exec or result.error_in_exec or error
            if isinstance(error, TimedOut):
                break
    return error


def told_of(error: BaseException, seconds: float) -> str:
    if isinstance(error, TimedOut):
        return f"longer than {seconds:g} s"
    message = type(error).__name__
    with suppress(Exception):  # the message is the notebook's code, too
        message += f": {error}"
    return message[:500]


def outcome_of_check(
    one: Callable, function: object, seconds: float, why: str | None = None
) -> tuple[str, str]:
    """Return (outcome, what is said of it) of an answer, by the course's own check; `why` is what
    went wrong in its cell."""
    try:
        if function is None or is_courses(function):
            return missing(why)
        with at_most(seconds):
            verdict = one(function, help=True)
    except AssertionError as wrong:  # a check's WrongAnswer is one
        return "wrong", str(wrong).removeprefix("✗ ")
    except TimedOut as error:
        return "timed out", told_of(error, seconds)
    except BaseException as error:  # the other exercises keep their marks
        return "crashed", told_of(error, seconds)
    return verdict.status, verdict.headline


def is_courses(function: object) -> bool:
    """Return whether an object is the package's: an import of it is no answer, since the exercise's
    cell is gone."""
    module, name = (str(getattr(function, a, "")) for a in ("__module__", "__qualname__"))
    loaded = module.startswith("peft_lessons") and sys.modules.get(module)
    return bool(loaded) and getattr(loaded, name, None) is function


def outcome_of_answer(
    one: Callable, ran: Ran, name: str, space: dict, seconds: float
) -> tuple[str, str]:
    """Return (outcome, what is said of it) of an exercise, by the names of the notebook as they are
    at its end, in `space`, or, if that makes it right, as they were where the lesson checks it:
    later cells may have given another value to a name that the answer uses."""
    answer = ran.answers.get(name)
    outcome, message = outcome_of_check(one, answer, seconds, ran.failed.get(name))
    if outcome in ("wrong", "crashed") and name in ran.spaces:
        last = dict(space)
        try:
            space.clear()
            space.update(ran.spaces[name])
            again = outcome_of_check(one, answer, seconds)
        finally:
            space.clear()
            space.update(last)
        if again[0] == "right":
            return again
    return outcome, message


class Calm:
    """Give Python and PyTorch the state that a check takes for granted, the one of when this was
    made: functions as they were, tensors on the CPU, no mode that changes what functions do."""

    def __init__(self) -> None:
        self.torch = torch = import_module("torch")
        modules = builtins, torch, torch.linalg, torch.nn.functional, import_module("math")
        # Bound now: what the notebook does to builtins does nothing to a dict's own method.
        self.restore = [(vars(module).update, dict(vars(module))) for module in modules]
        self.tensor = dict(vars(torch.Tensor))

    def __call__(self) -> None:
        for update, before in self.restore:
            update(before)
        torch = self.torch
        for name, now in dict(vars(torch.Tensor)).items():
            before = self.tensor.get(name)
            if before is None and hasattr(torch._C.TensorBase, name):
                delattr(torch.Tensor, name)
            elif before is not None and now is not before:
                setattr(torch.Tensor, name, before)
        torch.set_default_device(None)
        while torch._C._len_torch_function_stack():
            torch._C._pop_torch_function_stack()


def missing(why: str | None) -> tuple[str, str]:
    """Return (outcome, what is said of it) where there is no answer."""
    if why is None:
        return "not attempted", "the notebook does not define it"
    return "timed out" if why.startswith("longer than") else "crashed", f"its cell fails: {why}"


def earned(one: Callable, function: object, stub: str, space: Mapping, seconds: float) -> float:
    """Return the share of an exercise that a wrong answer has earned, beyond what the exercise's
    own text, without the line that raises, would have."""
    with suppress(BaseException), at_most(seconds):
        share = one.credit(function)
        if share > 0:
            started = dict(space)
            exec(compile(without_raise(stub), "<the stub>", "exec"), started)
            stub_share = one.credit(started[one.__name__])
            return max(0.0, (share - stub_share) / (1 - stub_share)) if stub_share < 1 else 0.0
    return 0.0


def main(argv: list[str]) -> None:
    notebook, lesson, seconds, memory, variant, skipped = argv
    path, seconds, skip = Path(notebook), float(seconds), skipped.split(",")
    word, out, write = sys.stdin.readline().strip(), os.dup(1), os.write
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the notebook prints goes nowhere
    encode, now, leave = str.encode, time.monotonic, os._exit

    def say(*words: str) -> None:
        hexed = [encode(text, "utf-8", "surrogatepass").hex() for text in words]
        try:
            write(out, encode(f"{word} {' '.join(hexed)}\n"))
        except OSError:  # the disk is full
            leave(TROUBLE)

    def mark(exercise: str, outcome: str, message: str, took: float, share: float = 0) -> None:
        say("mark", exercise, outcome, message[:MOST_TEXT], f"{took:.3f}", f"{share:.4f}")

    # Now: from `confine` on nobody here can read the lesson and the checks.
    course_lesson = Lesson(lesson, notebooks.read(notebooks.NOTEBOOKS / f"{lesson}.ipynb"))
    shell, calm = new_shell(), Calm()
    course = hidden(notebooks.MODULES[lesson], int(variant))
    judge, credit = outcome_of_answer, earned
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, _alarm)
    say("found", "held", json.dumps(confine(path.parent, float(memory))))
    # multiprocessing has left it: this module, under a name that a notebook can import.
    sys.modules.pop("__mp_main__", None)
    try:
        nb = notebooks.read(path)
        say("found", "texts", json.dumps(own_texts(nb, course_lesson.texts), ensure_ascii=False))
        say("found", "odd", json.dumps(odd_cells(nb, course_lesson)))
        say("found", "prints", json.dumps(prints(nb, course_lesson)))
    except Exception as error:
        for name in course_lesson.names:
            message = "the file is damaged: hand in a notebook that JupyterLab opens"
            mark(name, "crashed", f"{message} ({type(error).__name__})", 0)
        leave(0)
    ran = run(nb, course_lesson, shell, seconds, lambda what: say("at", what), skip)
    for name in course_lesson.names:
        if name in skip:
            continue
        say("at", name)
        started, one, answer = now(), getattr(course, name), ran.answers.get(name)
        calm()
        outcome, message = judge(one, ran, name, shell.user_ns, seconds)
        wrong = outcome == "wrong"
        share = (
            credit(one, answer, course_lesson.stubs[name], shell.user_ns, seconds) if wrong else 0
        )
        mark(name, outcome, message, now() - started, float(outcome == "right") or share)
    leave(0)  # no thread or exit handler of the notebook's holds the process up


if __name__ == "__main__":
    main(sys.argv[1:])
