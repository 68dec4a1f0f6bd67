"""Files that a harvest's shards are made of, and models that run otherwise: no shard is made of something else unnoticed."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphlens
from graphlens import Harvest, HookedTransformer, harvest
from graphlens.file.harvest_files import CORPUS, DIRECTIONS, FINISHED, shard_file
from graphlens.patching import HarvestMean
from tests.scale.harvests import content, harvested, rows

POINT = "blocks.1.hook_resid_post"
OPTIONS: dict[str, Any] = {"verbose": False, "batch_tokens": 150, "shard_tokens": 260}


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return HookedTransformer.from_pretrained_no_processing("tiny-gpt2")


def _unfinished(folder: Path) -> None:
    """Makes a finished harvest one that was killed before its second shard."""
    (folder / FINISHED).unlink()
    (folder / shard_file(1)).unlink()


def test_a_corpus_that_is_damaged_makes_no_shard(tmp_path: Path) -> None:
    whole = harvested(tmp_path / "h")
    data = bytearray((tmp_path / "h" / CORPUS).read_bytes())
    place = data.index(np.asarray(rows()[7][:4], np.int32).tobytes())
    data[place] ^= 1  # another token of the vocabulary
    _unfinished(tmp_path / "h")
    (tmp_path / "h" / CORPUS).write_bytes(data)
    for _ in range(2):
        with pytest.raises(graphlens.ModelFileError, match=f"{CORPUS}: missing, or other bytes than were written"):
            harvested(tmp_path / "h", resume=True)
        (tmp_path / "h" / CORPUS).unlink(missing_ok=True)
    assert whole.verify()[0] == f"{CORPUS}: missing, or other bytes than were written"


def test_directions_that_are_gone_are_written_again(model: HookedTransformer, tmp_path: Path) -> None:
    directions = np.random.default_rng(0).normal(size=(7, model.cfg.d_model)).astype(np.float32)
    options: dict[str, Any] = {**OPTIONS, "project": directions}
    harvest(model, rows(), POINT, tmp_path / "h", **options)
    whole = content(tmp_path / "h")
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\1")):
        _unfinished(tmp_path / "h")
        damage(tmp_path / "h" / DIRECTIONS)
        harvest(model, rows(), POINT, tmp_path / "h", resume=True, **options)
        found = content(tmp_path / "h")
        assert {name: found[name] for name in whole if name.endswith(".safetensors")} == {
            name: digest for name, digest in whole.items() if name.endswith(".safetensors")
        }


def test_a_model_that_runs_block_by_block_does_not_go_on_with_a_harvest_of_one_that_does_not(
    model: HookedTransformer, tmp_path: Path
) -> None:
    folder = Path(graphlens.embedded_model("tiny-gpt2"))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    streamed = HookedTransformer.from_onnx(folder, "cpu", max_memory=size)
    roomy = HookedTransformer.from_onnx(folder, "cpu", max_memory=10 * size)
    whole = HookedTransformer.from_onnx(folder, "cpu")
    harvest(whole, rows(), POINT, tmp_path / "whole", **OPTIONS)
    harvest(streamed, rows(), POINT, tmp_path / "streamed", **OPTIONS)
    for one, other in (("whole", streamed), ("streamed", whole)):
        with pytest.raises(graphlens.InputError, match="'max_memory' was"):
            harvest(other, rows(), POINT, tmp_path / one, resume=True, **OPTIONS)
    harvest(roomy, rows(), POINT, tmp_path / "whole", resume=True, **OPTIONS)  # opened whole: the same bits


def test_means_of_products_with_directions_are_no_activations(model: HookedTransformer, tmp_path: Path) -> None:
    square = np.random.default_rng(0).normal(size=(model.cfg.d_model,) * 2).astype(np.float32)
    made = harvest(model, rows(), POINT, tmp_path / "h", project=square, **OPTIONS)
    assert made[POINT].shape[1:] == (model.cfg.d_model,)
    with pytest.raises(graphlens.InputError, match="holds products with directions"):
        HarvestMean(Harvest(tmp_path / "h"))


def test_threads_may_read_more_shards_than_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = harvested(tmp_path / "h")
    monkeypatch.setattr("graphlens.analysis.harvest.OPEN_AT_ONCE", 1)
    wanted = made.tokens[:]
    places = np.random.default_rng(0).integers(0, len(made), 4000)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda place: int(made.tokens[int(place)]), places)) == wanted[places].tolist()


def test_means_of_a_harvest_go_to_other_processes_as_they_were_read(
    model: HookedTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = HarvestMean(harvest(model, rows(), POINT, tmp_path / "h", **OPTIONS))
    tokens = np.arange(1, 13).reshape(2, 6)
    site, metric = [graphlens.patching.Site("resid_post", 1)], graphlens.LogitDiff(3, 5)
    wanted = graphlens.sweep_pairs(model, tokens, tokens, site, metric, source=source, verbose=False).mean.values
    copied = pickle.loads(pickle.dumps(source))
    monkeypatch.setattr(Harvest, "mean", None)  # it is not read again
    found = graphlens.sweep_pairs(model, tokens, tokens, site, metric, source=copied, verbose=False).mean.values
    assert np.array_equal(found, wanted)
