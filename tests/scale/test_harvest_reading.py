"""A harvest is read as one array would be, in order, shuffled, and by other packages."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from graphlens import Harvest, HookedTransformer, harvest
from tests.scale.harvests import LAST, NAMES, rows

Z = "blocks.1.attn.hook_z"


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return HookedTransformer.from_pretrained_no_processing("tiny-gpt2")


@pytest.fixture(scope="module")
def found(model: HookedTransformer, tmp_path_factory: pytest.TempPathFactory) -> Harvest:
    out = tmp_path_factory.mktemp("read") / "h"
    made = harvest(model, rows(), NAMES, out, shard_tokens=90, batch_tokens=90, verbose=False)
    assert len(made.plan.shards) > 5
    return made


@pytest.fixture(scope="module")
def packed(model: HookedTransformer, tmp_path_factory: pytest.TempPathFactory) -> Harvest:
    out = tmp_path_factory.mktemp("packed") / "h"
    return harvest(model, rows(), LAST, out, pack=True, context=19, shard_tokens=90, dtype="float16", verbose=False)


def test_columns_are_indexed_as_arrays_are(found: Harvest) -> None:
    whole = np.concatenate([found.shard(index)[Z] for index in range(len(found.plan.shards))])
    column, n, random = found[Z], len(found), np.random.default_rng(0)
    assert column.shape == whole.shape == (n, 4, 32)
    keys = [
        slice(None),
        slice(5, 200),
        slice(n - 3, None),
        slice(50, 20),
        slice(None, None, 7),
        slice(100, 3, -9),
        0,
        -1,
        n - 1,
    ]
    keys += [np.int64(7), [3, -2, 3], random.integers(-n, n, 100), random.random(n) < 0.3]
    keys += [(slice(2, 150), 1), (5, 2, slice(1, 4)), (slice(None, 99), slice(None), 3)]
    for key in keys:
        assert np.array_equal(column[key], whole[key]), key
    assert column[[]].shape == (0, 4, 32)
    assert np.array_equal(np.asarray(column), whole)
    assert not column[1:3].flags.writeable  # the file itself


@pytest.mark.parametrize("buffer_bytes", [1, 40_000, 10**9])
@pytest.mark.parametrize("size", [1, 32, 64, 10_000])
def test_batches_hold_each_token_once(found: Harvest, size: int, buffer_bytes: int) -> None:
    names = [Z, "tokens", "documents", "positions"]
    made = list(found.batches(size, names, seed=3, buffer_bytes=buffer_bytes))
    assert [len(batch["tokens"]) for batch in made[:-1]] == [size] * (len(made) - 1)
    both = {name: np.concatenate([batch[name] for batch in made]) for name in names}
    places = {(d, p): place for place, (d, p) in enumerate(zip(found.documents[:], found.positions[:], strict=True))}
    order = [places[d, p] for d, p in zip(both["documents"], both["positions"], strict=True)]
    assert sorted(order) == list(range(len(found)))
    for name in names:
        assert np.array_equal(both[name], found.column(name)[order])
    again = list(found.batches(size, names, seed=3, buffer_bytes=buffer_bytes))
    assert all(np.array_equal(one[Z], two[Z]) for one, two in zip(made, again, strict=True))
    if buffer_bytes == 10**9:
        assert np.corrcoef(order, np.arange(len(order)))[0, 1] < 0.2
        other = np.concatenate([batch["positions"] for batch in found.batches(size, names, seed=4)])
        assert not np.array_equal(other, both["positions"])


def test_batches_in_order_and_without_the_last(found: Harvest) -> None:
    made = list(found.batches(100, ["tokens"], seed=None))
    assert np.array_equal(np.concatenate([batch["tokens"] for batch in made]), found.tokens[:])
    assert len(list(found.batches(100, ["tokens"], drop_last=True))) == len(found) // 100
    assert {name for batch in found.batches(100) for name in batch} == set(found.names)


def test_each_token_is_as_likely_in_the_first_batch(found: Harvest) -> None:
    seen = Counter[int]()
    for seed in range(60):
        first = next(found.batches(len(found) // 3, ["documents", "positions"], seed=seed, buffer_bytes=4_000))
        seen.update((first["documents"] >= 12).astype(int).tolist())
    expected = (found.documents[:] >= 12).mean()
    assert abs(seen[1] / seen.total() - expected) < 0.08


def test_another_process_opens_it(found: Harvest) -> None:
    assert np.array_equal(pickle.loads(pickle.dumps(found))[Z][5:9], found[Z][5:9])


def test_torch_loads_it(found: Harvest) -> None:
    torch = pytest.importorskip("torch")
    data = found.to_torch([Z, "tokens"])
    loader = torch.utils.data.DataLoader(data, batch_size=50, shuffle=True, generator=torch.Generator().manual_seed(0))
    batches = list(loader)
    assert batches[0][Z].shape == (50, 4, 32)
    tokens = torch.cat([batch["tokens"] for batch in batches])
    assert sorted(tokens.tolist()) == sorted(found.tokens[:].tolist())
    assert not np.array_equal(tokens, found.tokens[:])
    assert np.array_equal(data[7][Z], found[Z][7])


def test_arrow_and_datasets_read_the_files_themselves(found: Harvest, packed: Harvest) -> None:
    pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    for harvested, name in ((found, Z), (packed, LAST)):
        table = harvested.to_arrow()
        assert table.column_names == ["tokens", "documents", "positions", *harvested.names]
        assert table.num_rows == len(harvested)
        column = table.column(name).combine_chunks()
        flat = column.flatten(recursive=True).to_numpy()
        assert np.array_equal(flat, harvested[name][:].reshape(-1))
        assert table.column("tokens").to_pylist() == harvested.tokens[:].tolist()
        first = table.column(name).chunk(0).flatten(recursive=True)
        assert first.buffers()[1].address == harvested.shard(0)[name].ctypes.data  # no copy
        dataset = harvested.to_datasets([name, "documents"]).with_format("numpy")
        assert np.array_equal(dataset[30:40][name], harvested[name][30:40])


def test_saelens_layout(packed: Harvest, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    packed.save_saelens(tmp_path / "sae", LAST)
    saved = datasets.load_from_disk(str(tmp_path / "sae"))
    rows_ = len(packed) // 19
    assert saved.features[LAST].shape == (19, 128)
    assert len(saved) == rows_
    read = saved.with_format("numpy")
    assert np.array_equal(read[LAST][:].reshape(-1, 128), packed[LAST][: rows_ * 19])
    assert np.array_equal(read["token_ids"][:].reshape(-1), packed.tokens[: rows_ * 19])
    assert sorted(path.suffix for path in (tmp_path / "sae").iterdir()) == [".arrow", ".json", ".json"]
