"""Tutorials are Python files in percent format: they are run in Jupyter's kernel, and their pages show what cells show."""

from __future__ import annotations

import base64
import html
import os
import re
import sys
import tempfile
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tools.site.staging import ROOT, Stage

TUTORIALS = ROOT / "docs" / "tutorials"
LIMIT = 90  # seconds that a cell may take
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def tutorials() -> list[Path]:
    """The tutorials' files, in order."""
    return sorted(TUTORIALS.glob("*.py"))


def add_tutorials(stage: Stage, run: bool = True) -> dict[str, float]:
    """Takes up a page and a notebook for each tutorial.

    Args:
        stage: The pages.
        run: False leaves the outputs out: a quick look at the words.

    Returns:
        Tutorial -> the seconds that running it took.
    """
    import jupytext

    took = {}
    files = stage.folder / "pages" / "tutorials"
    files.mkdir(parents=True, exist_ok=True)
    for path in tutorials():
        notebook: Any = jupytext.read(path)
        notebook.metadata.setdefault(
            "kernelspec", {"name": "python3", "display_name": "Python 3", "language": "python"}
        )
        started = time.perf_counter()
        if run:
            execute(notebook, path)
        took[path.stem] = time.perf_counter() - started
        home = path.relative_to(ROOT).as_posix()
        stage.add(f"tutorials/{path.stem}.md", as_page(notebook, path.stem, files), home)
        jupytext.write(notebook, files / f"{path.stem}.ipynb")
    return took


def execute(notebook: Any, path: Path) -> None:
    """Runs every cell in a kernel of this Python, in an empty folder. A cell that raises ends the build, with its words."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ,
        "PYTHONPATH": search,
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "96",
        "PYTHONWARNINGS": "default",
    }
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as sockets:
        client: Any = NotebookClient(
            notebook, timeout=LIMIT, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        client.create_kernel_manager()
        # Files, not ports that others on the machine could speak to.
        client.km.transport, client.km.ip = "ipc", f"{sockets}/kernel"
        client.km.kernel_cmd = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        try:
            client.execute(env=environment)
        except CellExecutionError as error:
            raise RuntimeError(f"{path.name} failed:\n{COLOURS.sub('', str(error))}") from error


def as_page(notebook: Any, name: str, files: Path) -> str:
    """A notebook as Markdown. Pictures and HTML that cells show become files beside the page."""
    parts = []
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        shown = [output_of(item, f"{name}-{number}-{i}", files) for i, item in enumerate(cell.get("outputs", []))]
        shown = [text for text in shown if text]
        if shown:
            parts.append('<div class="cell-output" markdown="1">\n\n' + "\n\n".join(shown) + "\n\n</div>")
        if number == 1 or (number == 0 and len(notebook.cells) == 1):
            parts.insert(1, f"[This page as a notebook]({name}.ipynb)")
    return "\n\n".join(parts) + "\n"


def output_of(item: Any, name: str, files: Path) -> str:
    """One output of a cell as Markdown: HTML as a frame, then a picture, then text."""
    if item.output_type == "stream":
        return (
            fenced(item.text) if item.name == "stdout" else ""
        )  # warnings of other libraries differ from machine to machine
    data = item.get("data", {})
    if not data.get("text/html", "x").strip():
        return ""  # progress, which is taken away when it is done
    if "text/html" in data:
        page = files / f"{name}.html"
        frame = Frame(data["text/html"])
        page.write_text(whole_page(frame.page or data["text/html"]), encoding="utf-8")
        rights = f' sandbox="{frame.sandbox}"' if frame.sandbox else ""
        name = "What the cell shows"
        return f'<iframe src="{page.name}" title="{name}" height="{frame.height}"{rights}></iframe>'
    if "image/png" in data:
        (files / f"{name}.png").write_bytes(base64.b64decode(data["image/png"]))
        return f"![What the cell shows]({name}.png)"
    if "image/svg+xml" in data:
        (files / f"{name}.svg").write_text(data["image/svg+xml"], encoding="utf-8")
        return f"![What the cell shows]({name}.svg)"
    return fenced(data["text/plain"]) if data.get("text/plain") else ""


class Frame(HTMLParser):
    """The page inside of the frame that an output is, if it is one."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.page, self.sandbox, self.height = "", "", "420"
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes the frame's page, rights and height."""
        given = dict(attrs)
        if tag == "iframe" and given.get("srcdoc") and not self.page:
            self.page, self.sandbox = given["srcdoc"] or "", given.get("sandbox") or ""
            self.height = given.get("height") or self.height


def fenced(text: str) -> str:
    """Text that a cell printed, as a block."""
    return f"<pre><code>{html.escape(COLOURS.sub('', text).rstrip(), quote=False)}</code></pre>"


def whole_page(fragment: str) -> str:
    """A fragment of HTML as a page that stands alone in a frame."""
    if fragment.lstrip().lower().startswith(("<!doctype", "<html")):
        return fragment
    head = '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><title>output</title>'
    style = "<style>body{font:14px system-ui,sans-serif;margin:0}td,th{padding:.1em .6em;text-align:right}</style>"
    return f"{head}{style}{fragment}"
