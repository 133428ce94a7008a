"""Talk to a model and its adapter in a terminal: python -m peft_lessons.deploy.chat FOLDER [BASE]

FOLDER is an adapter's folder, or a GGUF file with an adapter or a whole model. BASE is a model's
name, folder or GGUF file: by default the one that the adapter names, for a GGUF adapter the
assistant. A line is a question by itself; an empty one, Ctrl+D or Ctrl+C ends.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..engine import CONFIG, read_adapter
from .export import adapter_to_gguf, bundled_name, to_gguf
from .header import is_adapter, read_header
from .server import serve

_ASSISTANT = "smollm2"
_LONGEST = 256  # tokens of an answer


def _is_file(name: str) -> bool:
    return name.endswith(".gguf") or os.path.isfile(name)


def _files(adapter: str, base: str | None, folder: Path) -> tuple[str, dict[str, str]]:
    """Return the arguments of `serve`: the model's file and its adapters. What is not in GGUF yet
    is written to `folder`. Errors as `to_gguf` and `adapter_to_gguf`."""
    if _is_file(adapter):
        if not is_adapter(read_header(adapter, "FOLDER")):
            return adapter, {}
        base = base or _ASSISTANT
    else:
        said = read_adapter(adapter)[0].get("base_model_name_or_path")
        base = base or bundled_name(said or "")
        if not base:
            raise ValueError(f"{CONFIG} in {adapter!r} names no base: name it after the folder")
        is_name = not _is_file(base)
        adapter = adapter_to_gguf(adapter, folder / "adapter.gguf", base if is_name else None)
    if not _is_file(base):
        print(f"Writing {base} as a GGUF file: some seconds.", file=sys.stderr, flush=True)
        base = to_gguf(base, folder / "base.gguf")
    return os.fspath(base), {"adapter": os.fspath(adapter)}


def _lines() -> Iterator[str]:
    """Yield the lines of the standard input until an empty one or its end."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        line = line.removeprefix("\ufeff").strip()  # PowerShell may begin a pipe with this mark
        if not line:
            return
        yield line


def main(arguments: list[str]) -> int:
    """Answer lines until there are no more; return the exit status."""
    if len(arguments) not in (1, 2):
        print("Which adapter? python course.py chat FOLDER [BASE]", file=sys.stderr)
        return 2
    adapter, base = (*arguments, None)[:2]
    if hasattr(sys.stdout, "reconfigure"):  # a Windows pipe may have no sign for an emoji
        sys.stdout.reconfigure(errors="replace")
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            file, adapters = _files(adapter, base, Path(folder))
            with serve(file, adapters) as server:
                if sys.stdin.isatty():
                    print("Ask in one line. An empty line ends.", flush=True)
                for line in _lines():
                    try:
                        answer = server.ask(line, next(iter(adapters), None), _LONGEST)
                        print(answer.strip(), flush=True)
                    except ValueError as error:  # too long a line
                        print(error, file=sys.stderr)
    except (OSError, ImportError, RuntimeError, TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
    return 0


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):  # a closed window ends it as Ctrl+C does, with no file left
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: sys.exit(1))
    raise SystemExit(main(sys.argv[1:]))
