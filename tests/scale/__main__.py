"""``python -m tests.scale --all``: harvests killed at 20 moments and resumed, and one opened by SAELens's own loader."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import graphlens
from tests.scale.harvests import LAST, content, harvested, killed_at, rows
from tools.bench.environments import TORCH, Environment

MOMENTS, FEW = 20, 3
CONTEXT = 19
SAELENS = Environment("sae-lens", ("sae-lens>=6.5", TORCH))
PAGE = """# Harvests, killed and opened elsewhere

A harvest of tiny-gpt2, activations and statistics in several shards, is killed with SIGKILL right before an event of the file
system in its folder, and resumed. What comes of it must have the very bytes of one that nothing stopped.

`{command}` wrote this page, with Python {python} on {system}.

"""


def kills(count: int, root: Path) -> str:
    """Kills a harvest at so many moments, evenly spread. Raises AssertionError for other bytes."""
    harvested(root / "whole")
    whole = content(root / "whole")
    events = killed_at(-1, root / "counted")
    assert content(root / "counted") == whole, "another process gave other bytes"
    for event in sorted({int(at) for at in np.linspace(0, events - 1, count)}):
        out = root / f"at{event}"
        killed_at(event, out)
        harvested(out, resume=True)
        assert content(out) == whole, f"killed before event {event} of {events}, it ended in other bytes"
    return f"{count} kills among {events} events: the same bytes"


def saelens(root: Path, python: Path) -> str:
    """Has SAELens's loader read what a harvest saved. Raises AssertionError for other numbers."""
    model = graphlens.HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
    found = graphlens.harvest(
        model, rows(), LAST, root / "packed", pack=True, context=CONTEXT, dtype="float16", verbose=False
    )
    found.save_saelens(root / "cached", LAST)
    worker = Path(__file__).with_name("saelens_worker.py")
    command = [str(python), str(worker), str(root / "cached"), LAST, str(CONTEXT), str(model.cfg.d_model)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    read = json.loads(done.stdout.splitlines()[-1])
    count = len(read["tokens"])
    assert count == 2 * CONTEXT, count
    assert read["tokens"] == found.tokens[:count].tolist()
    assert np.array_equal(np.asarray(read["values"], np.float32), found[LAST][:count].astype(np.float32))
    return f"{count} tokens read by ActivationsStore: the same numbers and ids"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.scale", description=__doc__)
    parser.add_argument("--all", action="store_true", help=f"{MOMENTS} kills in place of {FEW}, and SAELens")
    parser.add_argument("--work", type=Path, help="a folder to keep environments in")
    parser.add_argument("--saelens", type=Path, metavar="PYTHON", help="an interpreter that has SAELens")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table into this page; needs --all")
    asked = parser.parse_args()
    if asked.table and not asked.all:
        parser.error("--table needs --all.")
    failures, lines = 0, ["| what | found | seconds |", "|---|---|---:|"]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        works: dict[str, Callable[[], str]] = {"killed and resumed": lambda: kills(MOMENTS if asked.all else FEW, root)}
        if asked.all or asked.saelens:
            works["opened by SAELens"] = lambda: saelens(root, asked.saelens or SAELENS.python(asked.work or root))
        print("\n".join(lines), flush=True)
        for what, work in works.items():
            start = time.monotonic()
            try:
                said = work()
            except AssertionError as error:
                said, failures = f"**failed**: {error}", failures + 1
            lines.append(f"| {what} | {said} | {time.monotonic() - start:.0f} |")
            print(lines[-1], flush=True)
    if asked.table:
        command = "python -m tests.scale --all --table docs/scale-tests.md"
        head = PAGE.format(command=command, python=platform.python_version(), system=platform.system())
        asked.table.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
