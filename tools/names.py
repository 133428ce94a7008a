"""Which cells of a notebook must run so that some of them can."""

import ast
import symtable
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_COMPREHENSIONS = {"listcomp", "setcomp", "dictcomp", "genexpr"}


class Names(NamedTuple):
    """Hold the global names of a cell: those it looks up when it runs, those its functions look up
    when they are called, those it binds or changes, and those it imports."""

    now: set[str]
    later: set[str]
    bound: set[str]
    imported: set[str]


def looked_up(scope: symtable.SymbolTable) -> set[str]:
    """Return the global names that a scope and those within it look up."""
    own = {s.get_name() for s in scope.get_symbols() if s.is_global() and s.is_referenced()}
    return own.union(*map(looked_up, scope.get_children()))


def _changed(statement: ast.stmt) -> set[str]:
    """Return the names whose attributes or items a statement sets, or on which it calls something
    and drops the result, as in `model.eval()` or `inject(model, method)`."""
    parts: list[ast.expr] = []
    for node in ast.walk(statement):
        if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
            parts.append(node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            call = node.value
            parts += [call.func, *call.args, *(option.value for option in call.keywords)]
    found = set()
    for part in parts:
        while isinstance(part, ast.Attribute | ast.Subscript | ast.Starred):
            part = part.value
        if isinstance(part, ast.Name):
            found.add(part.id)
    return found


def names(source: str) -> Names:
    """Return the global names that a cell's source looks up and binds."""
    found, sure = Names(set(), set(), set(), set()), set()
    for statement in ast.parse(source).body:
        table = symtable.symtable(ast.unparse(statement), "cell", "exec")
        symbols = table.get_symbols()
        now = {s.get_name() for s in symbols if s.is_referenced()}
        for inner in table.get_children():
            now |= looked_up(inner)
            if inner.get_name() not in _COMPREHENSIONS:
                found.later.update(looked_up(inner))
        bound = {s.get_name() for s in symbols if s.is_assigned() or s.is_namespace()}
        found.now.update(now - sure)
        found.bound.update(bound | _changed(statement))
        found.imported.update(s.get_name() for s in symbols if s.is_imported())
        if isinstance(statement, ast.Assign | ast.FunctionDef | ast.ClassDef):
            sure |= bound  # what a loop or a condition binds may be of an earlier cell
    return found


def needed(sources: Sequence[str], wanted: Iterable[int]) -> list[int]:
    """Return the numbers of the cells that must run so that the wanted ones can, in order: those
    that bind or change a name that a needed cell looks up, and all that import."""
    cells = [names(source) for source in sources]
    kept, last = set(wanted), max(wanted, default=0)
    kept |= {n for n, cell in enumerate(cells[:last]) if cell.imported}
    imported = set().union(*(cell.imported for cell in cells))
    size = 0
    while len(kept) > size:
        size, now = len(kept), set()
        later = set().union(*(cells[n].later for n in kept))
        for n in range(last, -1, -1):
            if n in kept or cells[n].bound & ((now | later) - imported):
                kept.add(n)
                now |= cells[n].now
    return sorted(kept)
