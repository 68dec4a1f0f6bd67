"""``python -m tests.scale --all``: harvests killed, on a cluster, in S3 and opened by SAELens; a model larger than memory."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np

import graphlens
from graphlens.engine.machine import cores
from tests.scale import s3, streaming_check
from tests.scale.harvests import LAST, REPOSITORY, content, harvested, killed_at, rows
from tools.bench.environments import TORCH, Environment

MOMENTS, FEW = 20, 3
CONTEXT = 19
SAELENS = Environment("sae-lens", ("sae-lens>=6.5", TORCH))
PAGE = """# Harvests, killed and elsewhere

A harvest of tiny-gpt2, activations and statistics in several shards, is killed with SIGKILL right before an event of the file
system in its folder, and resumed. What comes of it must have the very bytes of one that nothing stopped. So it is on a cluster of
Ray's of which a node is taken away, and in S3, which a server of the package moto plays. A random Llama of 6 GB of weights runs
in a process that may have 2.5 GB.

![Shards of a harvest, which kills must not change](pictures/harvest.svg)

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


def in_s3(count: int, root: Path) -> str:
    """Harvests to S3: by one process, by Ray's workers, and by some that are killed. Raises AssertionError for other bytes."""
    assert not s3.missing(), f"the package {s3.missing()} is missing"
    harvested(root / "for-s3")
    whole, cache = content(root / "for-s3"), root / "cache"
    with s3.server() as bucket:
        requests = s3.killed_at(-1, f"{bucket}/here", cache)
        assert s3.content(f"{bucket}/here") == whole, "one process gave other bytes"
        for at in sorted({int(at) for at in np.linspace(0, requests - 1, count)}):
            s3.killed_at(at, f"{bucket}/at{at}", cache)
            with mock.patch.dict(os.environ, GRAPHLENS_CACHE=str(cache)):
                harvested(f"{bucket}/at{at}", resume=True)
            assert s3.content(f"{bucket}/at{at}") == whole, f"killed before request {at}, it ended in other bytes"
        code = f"from tests.scale.harvests import harvested; harvested('{bucket}/ray', {{}})"
        code = code.format(f"engine='ray', workers=2, threads={cores()}")
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "GRAPHLENS_CACHE": str(cache)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert s3.content(f"{bucket}/ray") == whole, "Ray's workers gave other bytes"
    return f"one process, Ray's workers, {count} kills among {requests} requests: the same bytes"


def on_two_nodes(root: Path) -> str:
    """A harvest on a cluster, one node of which dies. Raises AssertionError for other bytes."""
    command = [sys.executable, "-m", "tests.scale.two_nodes"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def larger_than_memory(root: Path) -> str:
    """Runs a model of 6 GB in a process of 2.5 GB. Raises AssertionError for more memory or other numbers."""
    lines = streaming_check.rows(root / "larger")
    shutil.rmtree(root / "larger")
    failed = [f"{line['what']}: {line['figure']:.4g}" for line in lines if not line["holds"]]
    assert not failed, "; ".join(failed)
    said = [f"{line['what']}: {line['figure']:.4g}" for line in lines]
    return "; ".join([*said, f"limited by {lines[0]['limited_by']}"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.scale", description=__doc__)
    parser.add_argument("--all", action="store_true", help=f"{MOMENTS} kills in place of {FEW}, and all else")
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
        if asked.all:
            works["a node of two dies"] = lambda: on_two_nodes(root)
            works["in S3"] = lambda: in_s3(MOMENTS, root)
            works["larger than memory"] = lambda: larger_than_memory(root)
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
