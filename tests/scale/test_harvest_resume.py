"""A harvest that was killed and resumed has the bytes of one that was not, and says what keeps it from being resumed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import graphlens
from graphlens import HookedTransformer, harvest
from graphlens.experiments import harvest_shard
from graphlens.file import harvest_files
from graphlens.file.harvest_folder import folder_of
from tests.scale.harvests import KILLED, LAST, NAMES, content, harvested, killed_at, rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The harvest that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "h"
    assert harvested(out).verify() == []
    return out


@pytest.fixture
def model() -> HookedTransformer:
    return HookedTransformer.from_pretrained_no_processing("tiny-gpt2")


def test_it_has_several_shards_and_no_leftovers(whole: Path) -> None:
    names = [path.name for path in whole.iterdir()]
    shards = [name for name in names if name.startswith("shard-")]
    assert len(shards) >= 3
    assert sorted(set(names) - set(shards)) == [
        "corpus.safetensors", "finished.json", "harvest.json", "reduced.safetensors",
    ]  # fmt: skip


def test_killed_and_resumed_it_has_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    count = killed_at(-1, tmp_path / "counted")
    assert content(tmp_path / "counted") == content(whole)  # another process gives them too
    for event in (2, count // 3, 2 * count // 3, count - 9):
        out = tmp_path / f"at{event}"
        killed_at(event, out)
        assert content(out) != content(whole), event
        harvested(out, resume=True)
        assert content(out) == content(whole), event


def test_shards_may_be_made_in_any_order(whole: Path, tmp_path: Path, model: HookedTransformer) -> None:
    out = tmp_path / "h"
    out.mkdir()
    for name in (harvest_files.PLAN, harvest_files.CORPUS):
        shutil.copy(whole / name, out)
    folder = folder_of(out)
    plan = harvest_files.read_plan(folder)
    for index in reversed(range(len(plan.shards))):
        harvest_shard.write_shard(folder, plan, index, model.runner)
    harvested(out, resume=True)
    assert content(out) == content(whole)


def test_interrupted_it_leaves_no_part_of_a_shard(
    whole: Path, tmp_path: Path, model: HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def stopping(*arguments: Any, **options: Any) -> None:
        made.append(1)
        if len(made) == 4:
            raise KeyboardInterrupt
        found(*arguments, **options)

    found = harvest_files.ShardWriter.put
    monkeypatch.setattr(harvest_files.ShardWriter, "put", lambda *a, **b: stopping(*a, **b))
    with pytest.raises(KeyboardInterrupt):
        harvest(model, rows(), NAMES, tmp_path / "h", **KILLED)
    assert not [path for path in (tmp_path / "h").iterdir() if "shard" in path.name]
    monkeypatch.undo()
    harvested(tmp_path / "h", resume=True)
    assert content(tmp_path / "h") == content(whole)


def test_a_full_disk_ends_it_and_it_goes_on_later(
    whole: Path, tmp_path: Path, model: HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    real, calls = harvest_files.ShardWriter.put, []

    def full(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(harvest_files.ShardWriter, "put", full)
    with pytest.raises(graphlens.ExportError, match="The disk is full"):
        harvest(model, rows(), NAMES, tmp_path / "h", **KILLED)
    assert not list((tmp_path / "h").glob(".*"))
    monkeypatch.undo()
    harvested(tmp_path / "h", resume=True)
    assert content(tmp_path / "h") == content(whole)


def test_too_little_room_is_said_before_the_first_run(
    tmp_path: Path, model: HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(graphlens.ExportError, match=r"writes 0\.00 GB more .* bytes a token"):
        harvest(model, rows(), LAST, tmp_path / "h", verbose=False)
    assert list((tmp_path / "h").iterdir()) == []


@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "missing"])
def test_verify_names_a_damaged_shard_and_resume_makes_it_again(whole: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "h"
    shutil.copytree(whole, out)
    place = out / harvest_files.shard_file(1)
    data = bytearray(place.read_bytes())
    if damage == "missing":
        place.unlink()
    else:
        data[-5] ^= 4
        place.write_bytes(data if damage == "a flipped bit" else data[:-9])
    (said,) = graphlens.Harvest(out).verify()
    assert said.startswith(f"{place.name}: ")
    harvested(out, resume=True)
    assert content(out) == content(whole)


def test_damaged_statistics_are_named_and_made_again(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "h"
    shutil.copytree(whole, out)
    data = bytearray((out / harvest_files.REDUCED).read_bytes())
    data[-100] ^= 1
    (out / harvest_files.REDUCED).write_bytes(data)
    assert graphlens.Harvest(out).verify() == ["reduced.safetensors: missing or damaged"]
    with pytest.raises(graphlens.ModelFileError, match="Resume the harvest"):
        _ = graphlens.Harvest(out).reduced
    harvested(out, resume=True)
    assert content(out) == content(whole)


def test_a_finished_harvest_is_resumed_without_a_run(
    whole: Path, model: HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(whole)
    monkeypatch.setattr(type(model.runner), "run", lambda *a, **b: pytest.fail("it ran"))
    harvest(model, rows(), NAMES, whole, resume=True, **KILLED)
    harvest(model, None, NAMES, whole, resume=True, **KILLED)
    assert content(whole) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float32"}, 'dtype was "float16" and is "float32"'),
        ({"reduce": ["top"]}, "reduce was"),
        ({"batch_tokens": 151}, "the option 'batch_tokens' was 150 and is 151"),
        ({"shard_tokens": 261}, "the option 'shard_tokens' was 260 and is 261"),
        ({"context": 100}, "the option 'context' was 128 and is 100"),
        ({"pack": True}, "the option 'pack' was false and is true"),
        ({"prepend_bos": True}, "the option 'bos' was null and is 0"),
        ({"keep": False}, "whether activations are written was true and is false"),
        ({"corpus": rows(seed=1)}, "the corpus 'digest' was"),
        ({"corpus": ["text"]}, 'the corpus \'kind\' was "ids" and is "text"'),
        ({"names": LAST}, "the hook points was"),
    ],
)
def test_another_harvest_is_not_resumed(
    whole: Path, model: HookedTransformer, options: dict[str, Any], said: str
) -> None:
    before = content(whole)
    given = {"corpus": rows(), "names": NAMES, **KILLED, **options}
    with pytest.raises(graphlens.InputError, match="this harvest was begun otherwise") as caught:
        harvest(model, out=whole, resume=True, **given)
    assert said in str(caught.value)
    assert content(whole) == before


def test_another_model_or_machine_is_named(whole: Path, tmp_path: Path, model: HookedTransformer) -> None:
    model.set_weights({"blocks.0.mlp.b_out": np.asarray(model.b_out[0]) + 1})
    with pytest.raises(graphlens.InputError, match="the model 'identity' was"):
        harvest(model, rows(), NAMES, whole, resume=True, **KILLED)
    out = tmp_path / "h"
    shutil.copytree(whole, out)
    plan = json.loads((out / "harvest.json").read_text())
    plan["environment"]["onnxruntime"] = "1.0.0"
    (out / "harvest.json").write_text(json.dumps(plan))
    with pytest.raises(graphlens.InputError, match=r"machine or package 'onnxruntime' was \"1.0.0\" and is"):
        harvested(out, resume=True)


def test_a_harvest_is_not_written_over(whole: Path, tmp_path: Path, model: HookedTransformer) -> None:
    with pytest.raises(graphlens.ExportError, match="resume=True"):
        harvest(model, rows(), LAST, whole)
    (tmp_path / "mine.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(graphlens.ExportError, match="not empty"):
            harvest(model, rows(), LAST, tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_plan_is_read_as_it_was_written(whole: Path) -> None:
    plan = harvest_files.read_plan(folder_of(whole))
    assert plan.to_json() == (whole / "harvest.json").read_text()
    assert plan.differences(plan) == []
    assert plan.differences(dataclasses.replace(plan, dtype="float32")) == ['dtype was "float16" and is "float32"']


def test_an_unfinished_harvest_is_not_opened(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "h"
    shutil.copytree(whole, out)
    (out / "finished.json").unlink()
    with pytest.raises(graphlens.ModelFileError, match="not finished"):
        graphlens.Harvest(out)
    with pytest.raises(graphlens.ModelFileError, match="is no harvest"):
        graphlens.Harvest(tmp_path)
