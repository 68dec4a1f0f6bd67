"""A disk that fills up under a harvest, and clocks that differ: what was made is kept, and goes on to the same bytes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import graphlens
from graphlens import HookedTransformer, harvest
from graphlens.experiments import harvest_planning
from graphlens.file.leftovers import ABANDONED
from tests.scale.harvests import content, rows
from tests.tmpfs import leave, mounted

SIZE = 160 << 20
OPTIONS: dict[str, Any] = {
    **{"dtype": "float32", "batch_tokens": 600, "shard_tokens": 1200, "verbose": False},
    **{"reduce": ["mean"], "keep": True},
}
CORPUS = rows(400, longest=40)


@pytest.fixture
def model() -> HookedTransformer:
    return HookedTransformer.from_pretrained_no_processing("tiny-gpt2")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", SIZE) as place:
        yield place


def test_a_disk_that_fills_up_keeps_whole_shards_to_go_on_from(
    disk: Path, tmp_path: Path, model: HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = harvest(model, CORPUS, "*.hook_resid_post", tmp_path / "whole", **OPTIONS)
    assert len(whole.plan.shards) >= 6
    each = max((tmp_path / "whole" / f"shard-{index:06d}.safetensors").stat().st_size for index in range(3))
    out, room = disk / "h", int(3.5 * each)
    real = harvest_planning.ensure_room

    def filling(*arguments: Any) -> None:
        """Somebody else fills the disk once the harvest has seen that there is room."""
        real(*arguments)
        if not (disk / "filler").exists() and (out / "harvest.json").exists():
            leave(disk, room)

    monkeypatch.setattr("graphlens.experiments.harvest.ensure_room", filling)
    with pytest.raises(graphlens.ExportError, match="The disk is full: free some space"):
        harvest(model, CORPUS, "*.hook_resid_post", out, **OPTIONS)
    names = sorted(path.name for path in out.iterdir())
    shards = [name for name in names if name.startswith("shard-") and name.endswith(".safetensors")]
    kept = [name for name in shards if "reduced" not in name]
    assert len(kept) == 3  # those there was room for
    for name in kept:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not [name for name in names if name.startswith(".")]
    with pytest.raises(graphlens.ModelFileError, match="not finished"):
        graphlens.Harvest(out)
    with pytest.raises(graphlens.ExportError, match="Free some"):  # still full: said before anything runs
        harvest(model, CORPUS, "*.hook_resid_post", out, resume=True, **OPTIONS)
    (disk / "filler").unlink()
    monkeypatch.undo()
    before = {name: (out / name).stat().st_mtime_ns for name in kept}
    harvest(model, CORPUS, "*.hook_resid_post", out, resume=True, **OPTIONS)
    assert content(out) == content(tmp_path / "whole")
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == before  # not made again


@pytest.mark.parametrize("days", [-400, 400])
def test_a_file_servers_clock_decides_nothing(days: int, tmp_path: Path, model: HookedTransformer) -> None:
    """Files from a machine whose clock is off are taken as they are, and what another machine writes stays for a day."""
    out, whole = tmp_path / "h", tmp_path / "whole"
    for folder in (out, whole):
        harvest(model, CORPUS[:60], "*.hook_resid_post", folder, shard_tokens=200, verbose=False)
    (out / "shard-000001.safetensors").unlink()
    theirs = out / ".shard-000001.safetensors.0123abcd-77-0123456789abcdef.partial"  # of another machine
    theirs.write_bytes(b"half")
    kept = out / "shard-000000.safetensors"
    for path in out.iterdir():
        os.utime(path, (time.time() + days * ABANDONED,) * 2)
    before = kept.stat().st_mtime_ns
    harvest(model, CORPUS[:60], "*.hook_resid_post", out, shard_tokens=200, resume=True, verbose=False)
    assert kept.stat().st_mtime_ns == before  # not made again
    assert theirs.exists() == (days > 0)
    theirs.unlink(missing_ok=True)
    assert content(out) == content(whole)
