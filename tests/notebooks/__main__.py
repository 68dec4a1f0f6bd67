"""``python -m tests.notebooks``: JupyterLab and marimo, served from this machine, opened in Chromium, a cell run, the page read.

Both live in an environment of their own, which is made unless ``--python`` names the interpreter of one that has jupyterlab,
marimo, anywidget and what graphlens needs. ``--pictures FOLDER`` keeps a picture of each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from graphlens import HookedTransformer
from tools.bench.environments import Environment
from tools.browser import Browser, Page

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = Environment(
    "notebooks",
    (
        *("jupyterlab==4.6.6", "marimo==0.25.2", "anywidget==0.11.0", "ipykernel"),
        *("onnxruntime>=1.30", "onnxruntime-extensions>=0.14", "ml_dtypes>=0.4", "onnx>=1.21", "onnx-ir>=1.0"),
        *("tokenizers>=0.20", "safetensors>=0.4.5", "huggingface_hub>=0.30", "rich>=13.7", "typer>=0.12"),
    ),
)
PROMPT = "When John and Mary went to the store, John gave a drink to"
CORRUPTED = "When John and Mary went to the store, Mary gave a drink to"
# Its bar is looked for while it runs, by a text that its own source does not show.
SLOW = """
import time

from graphlens.views.progress import steps

with steps("work" + "ing on it", 60) as bar:
    for _ in range(60):
        time.sleep(0.1)
        bar.advance()
"""
WORKING = (
    "[document.body.innerText, ...[...document.querySelectorAll('marimo-progress')].map((e) => e.shadowRoot.textContent)]"
    ".some((text) => text.includes('working on it'))"
)
CELLS = [
    f"""
from graphlens import HookedTransformer, views
from graphlens.metrics import LogitDiff
from graphlens.patching import act_patch_sites, sweep

model = HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
_, cache = model.run_with_cache({PROMPT!r})
views.attention(cache, {PROMPT!r})
""",
    f"""
ids = model.to_tokens({CORRUPTED!r})
sites = act_patch_sites(model, ids, "attn_head_out_by_pos")
found = sweep(model, ids, sites, cache, LogitDiff(" Mary", " John"))
found
""",
    f"""
picker = views.pick_head(cache, {PROMPT!r})
picker
""",
]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def served(command: list[str], address: str, folder: Path) -> Iterator[None]:
    """Runs a server until the ``with`` block ends; begins when it answers."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for part in (
        *("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"),
        *("XDG_CONFIG_HOME", "XDG_CACHE_HOME"),
    ):
        environment[part] = str(folder / "own" / part)
    log = folder / "server.log"
    with log.open("wb") as out:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            end = time.monotonic() + 90
            while True:
                try:
                    with urllib.request.urlopen(address, timeout=5):
                        break
                except OSError as error:
                    if time.monotonic() > end or server.poll() is not None:
                        raise RuntimeError(f"{command[0]} does not answer: {log.read_text()[-3000:]}") from error
                    time.sleep(0.3)
            yield
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(20)


def until_frames(page: Page, count: int) -> list[Page.Inside]:
    """The frames of a notebook, once there are so many and each has drawn its views."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        found = [inside for inside in page.frames() if inside("document.documentElement.dataset.drawn ?? null")]
        if len(found) >= count:
            return found
        time.sleep(0.5)
    raise TimeoutError(
        f"{len(found)} of {count} frames were drawn: {page.value('document.body.innerText.slice(0, 2000)')}"
    )


def look(page: Page, name: str, pictures: Path | None) -> None:
    """Reads the frames of a notebook whose cells ran, and compares their numbers with arrays of this process."""
    attention, heads, picker = until_frames(page, 3)
    model = HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
    _, cache = model.run_with_cache(PROMPT)
    numbers = "[...document.querySelectorAll({!r})].map((e) => Number(e.dataset.value))"
    attention("document.querySelector(\"[data-head='2.1']\").click()")
    np.testing.assert_array_equal(attention(numbers.format(".tokens .tok")), cache["pattern", 2][0, 1, -1])
    values = np.asarray(heads(numbers.format("td")))
    assert values.shape == (15 * 4,), values.shape
    assert np.isfinite(values).all()
    assert attention("getComputedStyle(document.body).fontSize") == "15px", "the notebook's style reaches the frame"
    picker("document.querySelector(\"[data-head='3.2']\").click()")
    if pictures is not None:
        page.screenshot(pictures / f"{name}.png")


def jupyter(python: Path, browser: Browser, folder: Path, pictures: Path | None) -> None:
    """JupyterLab: all cells run, frames drawn, and what the widget picked printed by a cell."""
    cell = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    cells = [
        {**cell, "id": f"c{i}", "source": source.strip()} for i, source in enumerate([SLOW, *CELLS, "picker.selected"])
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    book = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    (folder / "book.ipynb").write_text(json.dumps(book), encoding="utf-8")
    port = free_port()
    address = f"http://127.0.0.1:{port}/lab/tree/book.ipynb?token=look"
    switches = (
        "--no-browser",
        "--allow-root",
        "--ServerApp.token=look",
        "--ServerApp.port_retries=0",
        "--expose-app-in-browser",
    )
    command = [str(python), "-m", "jupyterlab", f"--port={port}", *switches]
    with served(command, address, folder):
        page = browser.open(address, width=1300, height=1000)
        page.until(
            "window.jupyterapp?.shell?.currentWidget?.context?.sessionContext?.session?.kernel?.status === 'idle'", 120
        )
        page.value("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.until(WORKING)
        page.until(f"!{WORKING}")
        look(page, "jupyterlab", pictures)
        # The widget has told the kernel by the time the kernel is idle again.
        page.until("window.jupyterapp.shell.currentWidget.context.sessionContext.session.kernel.status === 'idle'")
        page.value("window.jupyterapp.commands.execute('notebook:run-all-below')")
        page.until("document.body.innerText.includes(\"{'layer': 3, 'head': 2, 'token': 14}\")", 60)
        page.close()


def marimo(python: Path, browser: Browser, folder: Path, pictures: Path | None) -> None:
    """marimo: cells run by themselves, and the one that reads the widget runs again when it picks."""
    lines = ["import marimo", "app = marimo.App()"]
    names = ["cache, model, views, LogitDiff, act_patch_sites, sweep", "found", "picker", ""]
    shown = ["views.attention(cache, prompt)", "found", "picker", "mo.md(str(picker.selected))"]
    given = ["", "model, cache, LogitDiff, act_patch_sites, sweep", "views, cache, mo", "picker, mo"]
    wrapped = (
        CELLS[2]
        .replace("views.pick_head(", "mo.ui.anywidget(views.pick_head(")
        .replace(f"{PROMPT!r})", f"{PROMPT!r}))")
    )
    bodies = [*CELLS[:2], wrapped, ""]
    lines += ["@app.cell", "def _():", "    import marimo as mo", "    return (mo,)"]
    lines += ["@app.cell", "def _():", *(f"    {line}" for line in SLOW.strip().splitlines()), "    return"]
    for body, name, last, takes in zip(bodies, names, shown, given, strict=True):
        code = body.strip().splitlines()[:-1] if body else []
        last = last.replace("prompt", repr(PROMPT))
        lines += ["@app.cell", f"def _({takes}):", *(f"    {line}" for line in (*code, last, f"return {name}".strip()))]
    lines += ['if __name__ == "__main__":', "    app.run()"]
    (folder / "book.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
    port = free_port()
    address = f"http://127.0.0.1:{port}/"
    command = [str(python), "-m", "marimo", "run", "book.py", "--headless", "--no-token", "--port", str(port)]
    with served(command, address, folder):
        page = browser.open(address, width=1300, height=1000)
        page.until(WORKING)
        page.until(f"!{WORKING}")
        look(page, "marimo", pictures)
        page.until("document.body.innerText.replace(/\\s+/g, '').includes(\"{'layer':3,'head':2,'token':14}\")", 60)
        page.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.notebooks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", type=Path, help="an interpreter that has jupyterlab, marimo and anywidget")
    parser.add_argument("--pictures", type=Path, help="a folder for pictures")
    parser.add_argument("--only", choices=("jupyter", "marimo"), help="one of the two")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made, Browser() as browser:
        python = asked.python or Path(NOTEBOOKS.python(Path(made)))
        for name, job in (("jupyter", jupyter), ("marimo", marimo)):
            if asked.only in (None, name):
                folder = Path(made, name)
                folder.mkdir()
                start = time.monotonic()
                job(python, browser, folder, asked.pictures)
                print(f"{name}: numbers, frames and the widget agree ({time.monotonic() - start:.0f} s)")


if __name__ == "__main__":
    main()
