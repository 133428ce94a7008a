"""The rules for lesson notebooks: each yields its complaints about a notebook and its path."""

import ast
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from nbformat import NotebookNode

from tools import notebooks
from tools.environment import ROOT
from tools.notebooks import MODULES, code_cells, definitions, headings, imported, tags

MAX_BYTES = 1_000_000
MAX_LINES = 25
MIN_ALT = 20
SET_UP = "# Set-up"
# A misspelt tag would silently do nothing.
TAGS = notebooks.SOLVED | {"long", "plumbing", "cover", "nbval-check-output", "raises-exception"}

_MACHINE_PATH = re.compile(
    r"(?<![\w.~-])/(?:home|root|tmp|work|Users|mnt|opt|usr|var|private)/|\b[A-Z]:\\[A-Z]"
    r"|site-packages|dist-packages"
)
_DATA_URI = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=\s]*")
# Ruff refuses modules and their functions (pyproject.toml), but knows no methods, options, magics.
_REFUSED_CALLS = {
    "input", "system", "getoutput", "getoutput_split", "to_pickle", "read_pickle", "push_to_hub",
    "hf_hub_download", "snapshot_download", "urlopen", "urlretrieve", "load_dataset",
    "load_state_dict_from_url", "download_url_to_file",
}  # fmt: skip
_REFUSED_OPTIONS = ("trust_remote_code", "allow_pickle=True")
_SHELL_MAGICS = {
    "system", "sx", "sc", "!", "!!", "bash", "sh", "script", "cmd", "perl", "ruby", "pip", "conda",
    "mamba", "uv",
}  # fmt: skip

Complaints = Iterator[str]


def _label(number: int, cell: NotebookNode) -> str:
    first = next((line for line in cell.source.splitlines() if line.strip()), "")
    return f"cell {number} ({first.strip()[:40]!r})"


def _remake(path: Path) -> str:
    """Return the command that stores a lesson's outputs anew."""
    return f"run `make outputs LESSON={path.stem[:2]}`"


def _numbered(nb: NotebookNode, kind: str) -> Iterator[tuple[str, NotebookNode]]:
    for number, cell in enumerate(nb.cells):
        if cell.cell_type == kind:
            yield _label(number, cell), cell


def _tree(cell: NotebookNode) -> ast.Module:
    """Return the cell's syntax tree; magics and shell escapes are calls of get_ipython() in it."""
    return ast.parse(notebooks.python(cell))


def _texts(output: NotebookNode) -> Iterator[str]:
    """Return all that an output shows as text, without embedded pictures."""
    if output.output_type == "stream":
        yield output.text
    elif output.output_type == "error":
        yield "\n".join([output.evalue, *output.traceback])
    else:
        for kind, value in output.data.items():
            if not kind.startswith("image/") or kind == "image/svg+xml":
                yield _DATA_URI.sub("", value if isinstance(value, str) else str(value))


# --- stored outputs -----------------------------------------------------------------------------


def executed_in_order(nb: NotebookNode, path: Path) -> Complaints:
    counts = [cell.execution_count for cell in code_cells(nb) if cell.source.strip()]
    if counts != list(range(1, len(counts) + 1)):
        yield f"execution counts are {counts}, not 1 to {len(counts)}: {_remake(path)}"


def raises_only_where_tagged(nb: NotebookNode, path: Path) -> Complaints:
    for label, cell in _numbered(nb, "code"):
        raised = any(output.output_type == "error" for output in cell.outputs)
        tagged = "raises-exception" in tags(cell)
        if raised and not tagged:
            yield f"{label} stores an error"
        if tagged and not raised:
            yield f"{label} is tagged raises-exception and stores no error"


def no_stderr(nb: NotebookNode, path: Path) -> Complaints:
    for label, cell in _numbered(nb, "code"):
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                yield f"{label} stores stderr output: {output.text[:80]!r}"


def no_machine_paths(nb: NotebookNode, path: Path) -> Complaints:
    for number, cell in enumerate(nb.cells):
        texts = [_DATA_URI.sub("", cell.source)]
        for output in cell.get("outputs", []):
            texts += _texts(output)
        for text in texts:
            match = _MACHINE_PATH.search(text)
            if match or str(ROOT) in text:
                name = match.group() if match else "the checkout's path"
                yield f"{_label(number, cell)} shows a path of a machine: {name!r}"


def small_file(nb: NotebookNode, path: Path) -> Complaints:
    if (size := path.stat().st_size) >= MAX_BYTES:
        yield f"the file has {size:,} bytes, above {MAX_BYTES:,}"


class _ImageAlts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.alts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in {"img", "svg"}:
            self.alts.append(dict(attrs).get("alt" if tag == "img" else "aria-label") or "")


def pictures_have_alt_text(nb: NotebookNode, path: Path) -> Complaints:
    for label, cell in _numbered(nb, "code"):
        for output in cell.outputs:
            data = output.get("data", {})
            html = _ImageAlts()
            html.feed(data.get("text/html", ""))
            images = [kind for kind in data if kind.startswith("image/")]
            nested = [output.metadata.get(kind, {}).get("alt", "") for kind in images]
            for alt in html.alts + nested:
                if len(alt.strip()) < MIN_ALT:
                    yield f"{label} has a picture with alt text {alt!r}, below {MIN_ALT} characters"


def pictures_are_stored_once(nb: NotebookNode, path: Path) -> Complaints:
    for label, cell in _numbered(nb, "code"):
        if any(
            {"image/png", "text/html"} <= output.get("data", {}).keys() for output in cell.outputs
        ):
            yield f"{label} stores a figure twice, as HTML and as image/png: {_remake(path)}"


# --- code ---------------------------------------------------------------------------------------


def short_cells(nb: NotebookNode, path: Path) -> Complaints:
    """Require short cells. The set-up may be longer, which is a list of imports, and the comment
    that names a folded cell does not count."""
    for label, cell in _numbered(nb, "code"):
        lines = len(cell.source.splitlines()) - ("plumbing" in tags(cell))
        if lines > MAX_LINES and not cell.source.startswith(SET_UP):
            yield f"{label} has {lines} lines, above {MAX_LINES}"


def folded_cells_say_what_they_are(nb: NotebookNode, path: Path) -> Complaints:
    """Require a comment in the first line of a folded cell: JupyterLab shows it while the source is
    folded, and so does the site. The set-up is one cell."""
    sources = []
    for label, cell in _numbered(nb, "code"):
        sources.append(cell.source)
        if "plumbing" in tags(cell) and not notebooks.names_itself(cell):
            yield (
                f"{label} is folded and does not say what it is: begin it with '# Source of this "
                "figure', '# Source of this table' or '# Helper: …'"
            )
    if sources and not sources[0].startswith(SET_UP):
        yield f"the first code cell must begin with {SET_UP!r}"
    if (count := sum(source.startswith(SET_UP) for source in sources)) > 1:
        yield f"{count} cells begin with {SET_UP!r}: make them one"


def imports_in_setup(nb: NotebookNode, path: Path) -> Complaints:
    """Require imports in the first code cells only, without other code cells between."""
    in_setup = True
    for label, cell in _numbered(nb, "code"):
        names = imported(cell)
        if names and not in_setup:
            yield f"{label} imports {', '.join(sorted(names))} after the set-up cells"
        in_setup = in_setup and bool(names)


def nothing_unsafe(nb: NotebookNode, path: Path) -> Complaints:
    """Refuse a cell that waits for input, starts a process, loads a pickle, runs code from a
    model's files, or downloads or uploads, as far as ruff does not refuse it."""
    for label, cell in _numbered(nb, "code"):
        for call in (node for node in ast.walk(_tree(cell)) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func).rpartition(".")[2]
            first = str(getattr(call.args[0], "value", "")).split(" ")[0] if call.args else ""
            if name in _REFUSED_CALLS or ("magic" in name and first in _SHELL_MAGICS):
                yield f"{label} calls {name}({first})"
        source = cell.source.replace(" ", "")
        yield from (f"{label} uses {option}" for option in _REFUSED_OPTIONS if option in source)


# --- exercises ----------------------------------------------------------------------------------


def _signature(node: ast.stmt) -> dict[str, str]:
    """Return how to call a function, or every method of a class that stub and solution share."""
    if isinstance(node, ast.ClassDef):
        methods = [method for method in node.body if isinstance(method, ast.FunctionDef)]
        return {method.name: ast.unparse(method.args) for method in methods}
    return {node.name: ast.unparse(node.args)}


def exercises_have_checks(nb: NotebookNode, path: Path) -> Complaints:
    """Require the check of each stub between the stub and the next one."""
    module = MODULES.get(path.stem)
    if module is None:
        yield f"{path.name} is not in the map of lessons"
        return
    waiting = None
    for label, cell in _numbered(nb, "code"):
        if "exercise" in tags(cell):
            if waiting:
                yield f"no check of {waiting} before {label}"
            names = list(definitions(cell.source))
            if len(names) != 1:
                yield f"{label} is an exercise and defines {names or 'no function'}"
            waiting = names[0] if names else None
        elif "check" in tags(cell):
            if waiting and notebooks.is_check_of(cell, module, waiting):
                waiting = None
            else:
                want = f"check.{module}.{waiting}({waiting})" if waiting else "an exercise before"
                yield f"{label} is tagged check and lacks {want}"
    if waiting:
        yield f"no check of {waiting}"


def _bound(tree: ast.Module) -> set[str]:
    """Return all names that a source gives a value, at the top level or below."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    bound = set()
    for node in ast.walk(tree):
        if isinstance(node, kinds):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add(node.asname or node.name)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
    return bound


def exercises_keep_their_names(nb: NotebookNode, path: Path) -> Complaints:
    """Refuse a cell that gives an exercise's name to something of the course's: who repeats the
    check has that checked, and reads the answer."""
    code = list(_numbered(nb, "code"))
    names = {n for _, cell in code if "exercise" in tags(cell) for n in definitions(cell.source)}
    for label, cell in code:
        if "exercise" not in tags(cell) and (again := _bound(_tree(cell)) & names):
            yield f"{label} gives another value to {', '.join(sorted(again))}, an exercise's name"


def solutions_match_stubs(nb: NotebookNode, path: Path) -> Complaints:
    stubs = {}
    for _, cell in _numbered(nb, "code"):
        if "exercise" in tags(cell):
            stubs |= definitions(cell.source)
    solutions = {}
    for source in notebooks.read_solutions(path).values() if path.stem in MODULES else ():
        solutions |= definitions(source)
    yield from (f"no solution to {name}" for name in stubs.keys() - solutions.keys())
    yield from (f"a solution without stub: {name}" for name in solutions.keys() - stubs.keys())
    for name in stubs.keys() & solutions.keys():
        stub, solution = _signature(stubs[name]), _signature(solutions[name])
        for method in stub:
            if stub[method] != solution.get(method):
                other = f"({solution.get(method)})"
                yield f"{name}: the stub's {method}({stub[method]}) is not the solution's {other}"


# --- text ---------------------------------------------------------------------------------------


def _prose(cell: NotebookNode) -> str:
    """Return Markdown without its code, in which $ means other things."""
    return re.sub(r"`[^`\n]*`", "", notebooks.FENCED.sub("", cell.source))


def formulas_are_escaped_once(nb: NotebookNode, path: Path) -> Complaints:
    r"""Refuse a doubled backslash in an inline formula: it breaks the line, and \\text is lost."""
    for label, cell in _numbered(nb, "markdown"):
        for formula in re.findall(r"(?<!\$)\$([^$\n]+)\$(?!\$)", _prose(cell)):
            if re.search(r"\\\\[a-zA-Z]", formula):
                yield f"{label}: a backslash too many in ${formula}$"


def tables_have_headers(nb: NotebookNode, path: Path) -> Complaints:
    """Require a header in each table: a screen reader reads an empty first row as nothing."""
    empty = re.compile(r"^\|(?:[ \t]*\|)+[ \t]*\n\|[ \t]*:?-", re.M)
    for label, cell in _numbered(nb, "markdown"):
        if empty.search(cell.source):
            yield f"{label} has a table whose first row is empty"


def headings_in_order(nb: NotebookNode, path: Path) -> Complaints:
    levels = []
    for label, cell in _numbered(nb, "markdown"):
        for place, (level, title) in enumerate(headings(cell)):
            if levels and level > levels[-1] + 1:
                yield f"{label}: a heading of level {level} under one of {levels[-1]}"
            if title.startswith("Deeper") and (place or not notebooks.deeper(cell)):
                yield f"{label}: {title!r} must begin its cell, as in '## Deeper · Title'"
            levels.append(level)
    if levels[:1] != [1] or levels.count(1) != 1:
        yield "the notebook has one title of level 1, before all other headings"
    if not nb.cells or nb.cells[0].cell_type != "markdown":
        yield "the first cell holds the title"


# --- the file -----------------------------------------------------------------------------------


def clean_metadata(nb: NotebookNode, path: Path) -> Complaints:
    if nb.metadata != notebooks.CLEAN_METADATA:
        yield f"the notebook's metadata is not the clean one: {_remake(path)}"
    for number, (cell, metadata) in enumerate(
        zip(nb.cells, notebooks.cell_metadata(nb), strict=True)
    ):
        label = _label(number, cell)
        if cell.metadata != metadata:
            yield f"{label} has other metadata than {metadata}: {_remake(path)}"
        if unknown := set(tags(cell)) - TAGS:
            yield f"{label} has unknown tags: {', '.join(sorted(unknown))}"


RULES = (
    executed_in_order,
    raises_only_where_tagged,
    no_stderr,
    no_machine_paths,
    small_file,
    pictures_have_alt_text,
    pictures_are_stored_once,
    short_cells,
    folded_cells_say_what_they_are,
    imports_in_setup,
    nothing_unsafe,
    exercises_have_checks,
    exercises_keep_their_names,
    solutions_match_stubs,
    formulas_are_escaped_once,
    tables_have_headers,
    headings_in_order,
    clean_metadata,
)
