"""A disk that fills up: a sentence, nothing left behind, the old still there; and with room, a second run succeeds."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Faults, names
from tests.faults.jobs import ABSENT, JOBS, NEW
from tests.tmpfs import leave, mounted

SIZE = 24 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own in memory."""
    with mounted(tmp_path / "disk", SIZE) as place:
        yield place


def used(disk: Path, action: Callable[[], object]) -> int:
    """How much less is free after an action."""
    before = shutil.disk_usage(disk).free
    action()
    return before - shutil.disk_usage(disk).free


# One of each way to write; the others write in the same ways.
SOME = (
    *("export, converted", "export in place again", "export into the cache", "save over another"),
    *("process", "edits over others", "sweep"),
)


@pytest.mark.parametrize("job", SOME)
def test_a_full_disk_is_an_error_that_leaves_nothing(job: str, faults: Faults, disk: Path) -> None:
    assert job in JOBS
    faults.whole(job)
    trial = disk / "trial"
    trial.mkdir()
    faults.prepared(job, trial)
    need = used(disk, lambda: faults.run(job, trial))
    shutil.rmtree(trial)
    for share in (0.0, 0.7):
        folder = disk / f"filled to {share}"
        folder.mkdir()
        faults.prepared(job, folder)
        before = names(folder)
        filler = leave(disk, int(max(need, 0) * share))
        answer = faults.run(job, folder)
        if share == 0.0:
            assert "refused" in answer, answer
        if "refused" in answer:
            new = names(folder) - before - {"out", "cache", "cache/hooked"}
            assert not [name for name in new if ".partial" in name]
            # Of several results those that are complete stay, to go on from.
            assert new == set() or (share and job in ("sweep", "patch")), new
            assert faults.found(job, folder) in faults.allowed(job)
        filler.unlink()
        faults.ends_well(job, folder, faults.allowed(job))
        shutil.rmtree(folder)


def test_too_little_room_is_told_before_anything_is_copied(faults: Faults, disk: Path) -> None:
    """The message has both numbers, and nothing was written yet."""
    folder = disk / "one"
    folder.mkdir()
    faults.prepared("strip", folder)
    size = (folder / "in" / "model.safetensors").stat().st_size
    leave(disk, size // 2)
    events_before = names(folder)
    answer = faults.run("strip", folder)
    assert f"{size / 1e6:,.1f} MB would be written there" in answer["refused"]
    assert "--link" in answer["refused"]
    assert names(folder) == events_before


def test_packed_weights_are_done_without_where_there_is_no_room(faults: Faults, disk: Path) -> None:
    for room, state in ((None, NEW), (8192, ABSENT)):
        folder = disk / state
        folder.mkdir()
        faults.prepared("pack in passing", folder)
        if room is not None:
            leave(disk, room)
        assert faults.run("pack in passing", folder).get("done")
        assert faults.found("pack in passing", folder) == state
        assert not [name for name in names(folder) if name.endswith(".partial")]
