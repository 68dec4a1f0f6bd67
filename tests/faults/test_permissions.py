"""Writing where one may not: a sentence, nothing left behind, and what was there as it was."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.faults.harness import Faults, names
from tests.faults.jobs import JOBS, NEW
from tests.faults.warmed import NOBODY

pytestmark = pytest.mark.usefixtures("as_another_user")
# Where each job writes: the folder that must be refused to it. Packed weights are done without.
WRITES = {
    **dict.fromkeys(JOBS, "."),
    **{"export in place": "b", "export in place again": "b", "save over another": "out"},
    **{"export into the cache": "cache", "sweep": "out", "patch": "out", "attribute": "out"},
}
# They write as others do, or do without.
SAME = ("pack", "clear the cache", "export", "export, converted", "patch", "drivable", "save")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("job", [job for job in JOBS if job not in SAME])
def test_a_folder_that_cannot_be_written_is_an_error_and_stays(job: str, faults: Faults) -> None:
    folder = faults.prepared(job)
    before = content(folder)
    answer = faults.run(job, folder, refused=str(folder / WRITES[job]))
    assert "refused" in answer, answer
    said = "".join(part for part in answer["refused"] if part not in " \n│")  # a command draws a box around it
    assert str(folder) in said
    assert content(folder) == before
    faults.whole(job)
    faults.ends_well(job, folder, [faults.befores[job]])
    shutil.rmtree(folder)


def test_a_cache_that_cannot_be_written_keeps_no_run_from_happening(faults: Faults) -> None:
    folder = faults.prepared("pack")
    assert faults.found("pack", folder, refused=str(folder / "cache")) != NEW
    assert names(folder / "cache") == set()


@pytest.mark.parametrize("job", ["edits over others", "edits without arrays"])
def test_edits_of_ones_own_in_a_folder_that_cannot_be_written(job: str, faults: Faults) -> None:
    """They are written in place: the folder takes no second file."""
    folder = faults.prepared(job)
    for path in folder.iterdir():
        os.chown(path, NOBODY, NOBODY)
    answer = faults.run(job, folder, refused=str(folder))
    assert answer.get("done"), answer
    assert faults.found(job, folder) == NEW
