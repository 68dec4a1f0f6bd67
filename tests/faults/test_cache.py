"""The cache: removed while it is in use, cleared at any moment, and on another file system than the checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults.harness import Faults, sample
from tests.faults.jobs import ABSENT, NEW

JOB = "export into the cache"


def test_the_cache_is_removed_while_an_export_goes_there(faults: Faults) -> None:
    events, _ = faults.whole(JOB)
    for at in sample(events, 4):
        folder = faults.prepared(JOB)
        answer = faults.run(JOB, folder, at=at, act="remove cache")
        assert answer.get("done") or str(folder / "cache") in answer["refused"], answer
        faults.ends_well(JOB, folder, [ABSENT, NEW])
        shutil.rmtree(folder)


def test_clearing_the_cache_is_killed(faults: Faults) -> None:
    events, _ = faults.whole("clear the cache")
    for at in sample(events, 4):
        faults.killed("clear the cache", at)


def test_the_cache_is_removed_under_an_open_model(faults: Faults) -> None:
    folder = faults.prepared("open without a cache")
    assert faults.run("open without a cache", folder).get("done")


def test_the_cache_lies_on_another_file_system(faults: Faults, tmp_path: Path) -> None:
    if tmp_path.stat().st_dev == faults.root.stat().st_dev:
        pytest.skip("there is no second file system here")
    folder, cache = faults.prepared(JOB), tmp_path / "cache"
    assert faults.run(JOB, folder, cache=str(cache)).get("done")
    (export,) = (cache / "hooked").iterdir()
    assert (export / "model.safetensors").stat().st_nlink == 1  # copied
    shutil.copytree(cache / "hooked", folder / "cache" / "hooked")
    assert faults.found(JOB, folder) == NEW
    shutil.rmtree(folder)
