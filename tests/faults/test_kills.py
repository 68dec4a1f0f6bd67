"""kill -9 before an event of the file system: what was there stays, or what is new is complete, and a rerun mends all.

Here some events of each job; ``python -m tests.faults --all`` tries every one and prints a table.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.faults.harness import Faults, names, sample
from tests.faults.jobs import ABSENT, JOBS, NEW

KILLS = 2  # of each job: half a minute of processor time for all


@pytest.mark.parametrize("job", JOBS)
def test_a_killed_job_leaves_the_old_or_the_new(job: str, faults: Faults) -> None:
    events, _ = faults.whole(job)
    assert any(event.startswith("os.rename") for event in events)
    for at in sample(events, KILLS):
        faults.killed(job, at)


def test_an_export_is_killed_while_another_makes_the_same(faults: Faults) -> None:
    job = "export into the cache"
    events, _ = faults.whole(job)
    for at in sample(events, 2):
        folder = faults.prepared(job)
        request = {"do": "run", "job": job, "folder": str(folder)}
        first, second = faults.ask_all([{**request, "at": at}, request])
        # Whoever is second finds that the other's is there, and writes less.
        assert first.get("done") or first.get("killed") == signal.SIGKILL
        assert second.get("done"), second
        assert faults.ends_well(job, folder, [NEW]) == NEW
        shutil.rmtree(folder)


def test_what_a_dead_process_left_counts_until_it_is_swept(faults: Faults) -> None:
    """A killed packing leaves nothing outside the limit of packed weights."""
    job = "pack"
    events, left = faults.whole(job)
    (made,) = (at for at, event in enumerate(events) if event.startswith("os.mkdir") and event.endswith(".partial"))
    folder = faults.prepared(job)
    faults.run(job, folder, at=made + 1)
    (stale,) = (folder / "cache" / "packed").iterdir()
    assert stale.name.endswith(".partial")
    assert faults.run(job, folder)["done"]
    assert names(folder) == left
    shutil.rmtree(folder)


def test_the_watch_sees_what_a_job_writes(faults: Faults, tmp_path: Path) -> None:
    """Or else these tests would kill nothing."""
    events, left = faults.whole("export")
    for name in ("model.onnx", "model.safetensors", "config.json"):
        assert any(name in event for event in events), events
        assert f"out/{name}" in left
    assert faults.befores["export"] == ABSENT
    assert os.listdir(tmp_path) == []
