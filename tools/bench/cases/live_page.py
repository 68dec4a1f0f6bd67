"""A live page in Chromium: how long it takes to open, to answer at 16 and 128 tokens, and how much memory it holds.

The folder that ``graphlens page`` writes is served by Python from this machine. Memory is that of all of Chromium's processes
(proportional set size), less what they hold for an empty page. Linux only.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tools.bench.harness import Case, Findings, Row, Setup, floor_session
from tools.browser import Browser

RUNTIME = Path(__file__).resolve().parents[3] / "tests" / "js" / "node_modules"  # where npm ci put the page's programs
LENGTHS = (16, 128)
ANSWERS = 5


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def _processes(first: int) -> list[int]:
    """A process and all that come of it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found = [first]
    for process in found:  # which grows meanwhile
        found += children.get(process, [])
    return found


def _held(first: int) -> float:
    """MB that a process and all that come of it hold."""
    total = 0
    for process in _processes(first):
        try:
            total += int(Path(f"/proc/{process}/smaps_rollup").read_text().split("Pss:")[1].split()[0])
        except (OSError, IndexError):  # it ended
            continue
    return total / 1e3


class _Watch:
    """The most memory that a browser held so far."""

    def __init__(self, process: int) -> None:
        self.most, self._process, self._ended = 0.0, process, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(0.1):
            self.most = max(self.most, _held(self._process))

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """The address of a folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    thread.join()
    server.server_close()


def _once(address: str, lengths: tuple[int, ...]) -> dict[str, float]:
    """One round in a browser of its own: figures by their label."""
    found: dict[str, float] = {}
    with Browser(300) as browser:
        browser.open("about:blank")
        time.sleep(1)
        empty = _held(browser.pid)
        watch = _Watch(browser.pid)
        try:
            start = time.perf_counter()
            page = browser.open(address)
            ready = page.value("window.graphlens.ready")
            assert isinstance(ready, dict)
            found["open, until the first answer is shown"] = time.perf_counter() - start
            if ready["distrust"] is not None:
                raise SystemExit(f"the page says: {ready['distrust']}")
            for length in lengths:
                times = page.value(
                    f"""(async () => {{
                      const ids = Array.from({{length: {length}}}, (_, i) => i + 1), times = [];
                      for (let i = 0; i < {ANSWERS + 1}; i++) {{
                        const start = performance.now();
                        await window.graphlens.run(ids);
                        times.push(performance.now() - start);
                      }}
                      return times.slice(1).sort((a, b) => a - b);
                    }})()"""
                )
                assert isinstance(times, list)
                found[f"answer, {length} tokens"] = times[ANSWERS // 2]
            found["memory, held after that"] = _held(browser.pid) - empty
        finally:
            watch.end()
        found["memory, at most"] = watch.most - empty
    return found


def run(setup: Setup) -> Findings:
    """Seconds and megabytes of a live page, and of the answers bare ONNX Runtime on one thread of this machine as the floor."""
    import numpy as np

    from graphlens.deploy import write_page

    site = setup.model.workdir / "live-page"
    shutil.rmtree(site, ignore_errors=True)
    write_page(setup.model.hooked, site, runtime=RUNTIME if RUNTIME.is_dir() else None, announce=print)
    size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
    most = json.loads((setup.model.hooked / "config.json").read_text()).get("n_positions", 128)
    lengths = tuple(length for length in LENGTHS if length <= most)
    with _served(site) as address:
        rounds = [_once(address, lengths) for _ in range(setup.repeats)]
    floors: dict[str, list[float]] = {}
    bare = floor_session(setup.model)
    for length in lengths:
        ids = np.arange(1, length + 1)[None]
        bare.run(["logits"], {"input_ids": ids})
        for _ in rounds:
            start = time.perf_counter()
            bare.run(["logits"], {"input_ids": ids})
            floors.setdefault(f"answer, {length} tokens", []).append((time.perf_counter() - start) * 1e3)
    shutil.rmtree(site)
    weights = setup.model.weights_bytes / 1e6
    rows = []
    for label in rounds[0]:
        samples = [each[label] for each in rounds]
        unit = {"memory": "MB", "answer": "ms", "open": "s"}[label.partition(",")[0]]
        rows.append(Row(label, unit, samples, floors.get(label, ())))
    note = f"The folder has {size / 1e6:.0f} MB, {weights:.0f} of them weights. The page runs on one thread of WebAssembly."
    return Findings(rows, "a bare InferenceSession of the model without hooks, on all cores", (note,))


CASE = Case(run, repeats=3)
