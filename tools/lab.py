"""Drive JupyterLab in a headless Chromium: run a notebook, edit and run cells, read and picture it.

    python -m tools.lab NOTEBOOK OUT.png [--dark] [--no-run] [--unfold]

takes pictures of a notebook, OUT-0.png, OUT-1.png and so on. The notebook is run first. Sections
and sources are then folded as a learner sees them after "Run all", and answers to predictions are
open. With --no-run the stored notebook is pictured, all folds closed; with --unfold everything is
open.

Clicks on menus proved flaky. JupyterLab's own commands are called instead, through the object that
--expose-app-in-browser puts into the page.
"""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page, Playwright, sync_playwright

from tools.environment import offline_environment

CHROMIUM_FLAGS = [
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTH, HEIGHT = 1280, 1000
SCREEN = 8000  # the height of a picture: Chromium paints no more than 16,384 at once
NOTEBOOK = "window.jupyterapp.shell.currentWidget.content"
STATE = f"""() => {NOTEBOOK}.widgets.map(w => ({{
    type: w.model.type,
    source: w.model.sharedModel.getSource(),
    tags: w.model.getMetadata('tags') ?? [],
    running: w.model.executionState === 'running',
    count: w.model.executionCount ?? null,
    errors: (w.model.outputs?.toJSON() ?? []).filter(o => o.output_type === 'error').length,
    text: w.node.querySelector('.jp-Cell-outputArea')?.innerText ?? '',
}}))"""
UNFOLD = ("expand-all-headings", "show-all-cell-code", "show-all-cell-outputs")
READY = f"""async () => {{
    const widget = window.jupyterapp.shell.currentWidget;
    await widget.sessionContext.ready;
    await widget.sessionContext.session.kernel.info;
    await widget.revealed;
    return {NOTEBOOK}.widgets.length;
}}"""


def chromium() -> str | None:
    """Return the browser's path, or None if there is no browser."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for path in map(shutil.which, names) if path), None)


def launch(playwright: Playwright) -> Browser:
    """Start Chromium, in its sandbox unless the process is root's, for whom Chromium refuses it."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    return playwright.chromium.launch(
        executable_path=chromium(), args=CHROMIUM_FLAGS, chromium_sandbox=not root
    )


class Lab:
    """Drive a notebook open in JupyterLab. Cells count from 0, markdown cells included."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.console_errors: list[str] = []
        page.on("pageerror", lambda error: self.console_errors.append(str(error)))
        page.on(
            "console",
            lambda entry: entry.type == "error" and self.console_errors.append(entry.text),
        )

    def open(self, url: str) -> None:
        """Load a page of JupyterLab, and return when its notebook is ready."""
        self.page.goto(url)
        self.page.wait_for_function(
            "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
            "?.status === 'idle'",
            timeout=90_000,
        )
        self.page.evaluate(READY)

    def cells(self) -> list[dict]:
        """Return type, source, tags, state, execution count, errors and visible output of each
        cell."""
        return self.page.evaluate(STATE)

    def find(self, text: str, tag: str) -> int:
        """Return the number of the one cell with a tag whose source contains some text."""
        cells = enumerate(self.cells())
        (number,) = [n for n, cell in cells if tag in cell["tags"] and text in cell["source"]]
        return number

    def _command(self, name: str) -> None:
        # Not awaited: its promise may resolve early, after a cell with a tolerated exception.
        self.page.evaluate(f"() => {{ window.jupyterapp.commands.execute('{name}'); }}")

    def run_all(self, seconds: float = 300) -> None:
        """Run all cells, and return when none runs or waits any more."""
        self._command("notebook:clear-all-cell-outputs")
        self._command("notebook:run-all-cells")
        deadline, quiet_since = time.monotonic() + seconds, time.monotonic()
        while True:
            self.page.wait_for_timeout(200)
            code = [c for c in self.cells() if c["type"] == "code" and c["source"].strip()]
            if any(cell["running"] for cell in code):
                quiet_since = time.monotonic()
            elif all(cell["count"] for cell in code) or time.monotonic() - quiet_since > 5:
                return  # done, or stopped by an error
            if time.monotonic() > deadline:
                raise TimeoutError(f"the notebook still runs after {seconds} s")

    def run_cell(self, number: int, source: str | None = None, seconds: float = 60) -> dict:
        """Put a source into a cell, if given, run it, and return its state."""
        cell = f"{NOTEBOOK}.widgets[{number}]"
        if source is not None:
            self.page.evaluate(f"s => {cell}.model.sharedModel.setSource(s)", source)
        before = self.cells()[number]["count"]
        self.page.evaluate(f"() => {{ {NOTEBOOK}.activeCellIndex = {number}; }}")
        self._command("notebook:run-cell")
        self.page.wait_for_function(
            f"n => {{ const m = {cell}.model; return m.executionState !== 'running'"
            " && m.executionCount && m.executionCount !== n }",
            arg=before,
            timeout=1000 * seconds,
        )
        self.page.wait_for_timeout(200)  # outputs are painted after the model changes
        return self.cells()[number]

    def unfold(self) -> None:
        """Open all collapsed headings, hidden sources and hidden outputs."""
        for name in UNFOLD:
            self._command(f"notebook:{name}")
        self.page.wait_for_timeout(1000)

    def screenshots(self, file: Path) -> None:
        """Take screenshots of the whole notebook: NAME-0.png, NAME-1.png and so on."""
        self.page.set_viewport_size({"width": WIDTH, "height": SCREEN})
        self.page.evaluate(f"() => {{ {NOTEBOOK}.activeCellIndex = 0; }}")
        self.page.wait_for_timeout(1000)
        panel = self.page.locator(".jp-WindowedPanel-outer")
        height, screen = panel.evaluate("panel => [panel.scrollHeight, panel.clientHeight]")
        for number, top in enumerate(range(0, height, screen)):
            panel.evaluate(f"panel => {{ panel.scrollTop = {top}; }}")
            self.page.wait_for_timeout(200)
            panel.screenshot(path=file.with_stem(f"{file.stem}-{number}"))


def _settings(folder: Path, dark: bool) -> None:
    settings = {
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "apputils-extension/themes": {"theme": "JupyterLab Dark" if dark else "JupyterLab Light"},
        # Cells out of sight exist too, and the last picture ends with the notebook.
        "notebook-extension/tracker": {"windowingMode": "none", "scrollPastEnd": False},
    }
    for name, value in settings.items():
        file = folder / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value), encoding="utf-8")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serve(root: Path, scratch: Path, dark: bool) -> Iterator[tuple[str, str]]:
    """Run JupyterLab on the loopback address, with nothing of the user's own settings.

    Yields its URL and its token. Other accounts of the machine reach the address too, and see the
    options of each process, but not its environment, which holds the token."""
    _settings(scratch / "settings", dark)
    folders = {
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
    }
    port, token = _free_port(), secrets.token_urlsafe()
    url = f"http://127.0.0.1:{port}"
    options = [
        "--no-browser",
        "--allow-root",
        "--expose-app-in-browser",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={root}",
    ]
    log = scratch / "server.log"
    with log.open("w", encoding="utf-8") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            env=offline_environment()
            | {k: str(scratch / v) for k, v in folders.items()}
            | {"JUPYTER_TOKEN": token},
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + 60
        status = urllib.request.Request(
            f"{url}/api/status", headers={"Authorization": f"token {token}"}
        )
        while True:
            try:
                urllib.request.urlopen(status).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(
                        "JupyterLab doesn't start:\n" + log.read_text(encoding="utf-8")
                    ) from None
                time.sleep(0.2)
        yield url, token
    finally:
        server.terminate()
        server.wait(30)


@contextlib.contextmanager
def open_lab(notebook: Path, *, dark: bool = False) -> Iterator[Lab]:
    """Open a copy of a notebook, alone in a folder of its own, so that no file changes."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        root = scratch / "notebooks"
        root.mkdir()
        shutil.copy(notebook, root)
        with serve(root, scratch, dark) as (url, token), sync_playwright() as playwright:
            browser = launch(playwright)
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            lab = Lab(page)
            lab.open(f"{url}/doc/tree/{notebook.name}?token={token}")
            yield lab
            browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.lab")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--dark", action="store_true", help="in JupyterLab's dark theme")
    parser.add_argument("--no-run", action="store_true", help="with the stored outputs")
    parser.add_argument("--unfold", action="store_true", help="with everything open")
    args = parser.parse_args()
    with open_lab(args.notebook, dark=args.dark) as lab:
        if not args.no_run:
            lab.run_all()
        if args.unfold:
            lab.unfold()
        lab.screenshots(args.picture)


if __name__ == "__main__":
    main()
