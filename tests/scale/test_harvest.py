"""A harvest holds what run_with_cache gives for each document, its tokens told by document and position."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import graphlens
from graphlens import Harvest, HookedTransformer, harvest
from graphlens.analysis.reductions import Quantiles, Top
from tests.scale.harvests import LAST, NAMES, rows

TEXTS = [
    "When John and Mary went to the store, John gave a drink to",
    "",
    "Hello",
    "The cat sat on the mat. " * 5,
    "é ☃ x",
]


@pytest.fixture(scope="module", params=["tiny-gpt2", "tiny-llama"])
def model(request: pytest.FixtureRequest) -> HookedTransformer:
    return HookedTransformer.from_pretrained_no_processing(request.param)


@pytest.fixture(scope="module")
def gpt2() -> HookedTransformer:
    return HookedTransformer.from_pretrained_no_processing("tiny-gpt2")


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-5)


def test_it_equals_run_with_cache_on_each_document(model: HookedTransformer, tmp_path: Path) -> None:
    names = [*NAMES, "blocks.0.attn.hook_k", "blocks.2.ln1.hook_scale", "hook_embed"]
    found = harvest(model, TEXTS, names, tmp_path / "h", batch_tokens=50, shard_tokens=40, verbose=False)
    assert len(found.plan.shards) > 2
    documents, seen = found.documents[:], 0
    for number, text in enumerate(TEXTS):
        mine = documents == number
        if not text:
            assert not mine.any()
            continue
        tokens = model.to_tokens(text)
        assert np.array_equal(found.tokens[mine], tokens[0])
        assert np.array_equal(found.positions[mine], np.arange(tokens.shape[1]))
        _, cache = model.run_with_cache(tokens, names_filter=list(found.names))
        for name in found.names:
            close(found[name][mine], cache[name][0])
        seen += tokens.shape[1]
    assert seen == len(found)
    assert found.n_documents == len(TEXTS)
    assert found.names == tuple(name for name in model.hook_dict if name in found)  # in firing order
    assert found["blocks.0.attn.hook_k"].shape == (len(found), *cache["blocks.0.attn.hook_k"].shape[2:])


def test_ids_get_no_bos_unless_asked(gpt2: HookedTransformer, tmp_path: Path) -> None:
    given = rows(5)
    plain = harvest(gpt2, given, LAST, tmp_path / "a", verbose=False)
    assert plain.tokens[:].tolist() == [token for row in given for token in row]
    asked = harvest(gpt2, given, LAST, tmp_path / "b", prepend_bos=True, verbose=False)
    assert asked.tokens[:].tolist() == [token for row in given if row for token in [0, *row]]
    array = np.asarray([[5, 6, 7], [8, 9, 10]], np.uint16)
    assert harvest(gpt2, array, LAST, tmp_path / "c", verbose=False).tokens[:].tolist() == [5, 6, 7, 8, 9, 10]


def test_packed_rows_are_the_rows_that_are_run(gpt2: HookedTransformer, tmp_path: Path) -> None:
    given, context = rows(), 17
    found = harvest(
        gpt2, given, LAST, tmp_path / "h", pack=True, context=context, prepend_bos=True, shard_tokens=60, verbose=False
    )
    # By hand: BOS before each document and at the start of each row.
    stream: list[list[tuple[int, int]]] = [[]]
    for number, document in enumerate(given):
        fresh = True
        for token in document:
            if (fresh and len(stream[-1]) >= context - 1) or len(stream[-1]) == context:
                stream.append([])
                fresh = True
            if fresh or not stream[-1]:
                stream[-1].append((0, number))
            stream[-1].append((token, number))
            fresh = False
    tokens = [token for row in stream for token, _ in row]
    assert found.tokens[:].tolist() == tokens
    assert found.documents[:].tolist() == [number for row in stream for _, number in row]
    assert found.positions[:].tolist() == [place for row in stream for place in range(len(row))]
    start = 0
    for row in stream:
        _, cache = gpt2.run_with_cache(np.asarray([[token for token, _ in row]]), names_filter=LAST)
        close(found[LAST][start : start + len(row)], cache[LAST][0])
        start += len(row)


@pytest.mark.parametrize("too_long", ["split", "cut"])
def test_long_documents_are_split_or_cut(gpt2: HookedTransformer, tmp_path: Path, too_long: Any) -> None:
    document = list(range(1, 60))
    found = harvest(
        gpt2, [[7], document], LAST, tmp_path / "h", context=25, prepend_bos=True, too_long=too_long, verbose=False
    )
    parts = [[0, 7], [0, *document[:24]], [0, *document[24:48]], [0, *document[48:]]][: 4 if too_long == "split" else 2]
    assert found.tokens[:].tolist() == [token for part in parts for token in part]
    start = 0
    for part in parts:
        close(found[LAST][start : start + len(part)], gpt2.run_with_cache(np.asarray([part]))[1][LAST][0])
        start += len(part)


def test_bos_is_dropped_and_padding_kept_by_choice(gpt2: HookedTransformer, tmp_path: Path) -> None:
    given = rows(6)
    whole = harvest(gpt2, given, LAST, tmp_path / "a", prepend_bos=True, context=61, verbose=False)
    dropped = harvest(gpt2, given, LAST, tmp_path / "b", prepend_bos=True, keep_bos=False, context=61, verbose=False)
    assert dropped.tokens[:].tolist() == [token for row in given for token in row][: len(dropped)]
    close(dropped[LAST][:], whole[LAST][whole.tokens[:] != 0])
    own = harvest(gpt2, [[0, 5, 6], [7, 0, 8]], LAST, tmp_path / "c", keep_bos=False, verbose=False)
    assert own.tokens[:].tolist() == [5, 6, 7, 0, 8]  # a document's own BOS token goes, another 0 stays
    padded = harvest(gpt2, given, LAST, tmp_path / "d", prepend_bos=True, keep_pad=True, context=61, verbose=False)
    held = [row for row in given if row]
    assert len(padded) == 61 * sum(-(-len(row) // 60) for row in held)
    first = padded.tokens[:61].tolist()
    assert first == [0, *held[0], *[0] * (60 - len(held[0]))]
    ran = gpt2.run_with_cache(np.asarray([first]), names_filter=LAST)[1][LAST][0]
    close(padded[LAST][:61], ran)


def test_the_last_token_alone(gpt2: HookedTransformer, tmp_path: Path) -> None:
    given = rows(9)
    for pack in (False, True):
        found = harvest(
            gpt2,
            given,
            LAST,
            tmp_path / f"h{pack}",
            positions="last",
            context=20,
            pack=pack,
            batch_tokens=60,
            verbose=False,
        )
        assert found.documents[:].tolist() == [number for number, row in enumerate(given) if row]
        assert found.tokens[:].tolist() == [row[-1] for row in given if row]
    assert found[LAST].shape == (8, gpt2.cfg.d_model)


@pytest.mark.parametrize(("dtype", "kind"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
def test_narrow_dtypes_are_the_rounded_ones(gpt2: HookedTransformer, tmp_path: Path, dtype: str, kind: Any) -> None:
    wide = harvest(gpt2, rows(7), NAMES, tmp_path / "a", verbose=False)
    narrow = harvest(gpt2, rows(7), NAMES, tmp_path / "b", dtype=dtype, verbose=False)
    for name in wide.names:
        assert narrow[name][:].dtype == kind
        assert np.array_equal(narrow[name][:], wide[name][:].astype(kind))


def test_statistics_equal_numpy_on_all_activations(model: HookedTransformer, tmp_path: Path) -> None:
    names = [LAST, "blocks.1.attn.hook_z"]
    options: dict[str, Any] = {"batch_tokens": 100, "shard_tokens": 270, "verbose": False}
    kinds = ["mean", "covariance", "variance", Quantiles((0.0, 0.1, 0.5, 1.0)), Top(7)]
    found = harvest(model, rows(), names, tmp_path / "r", reduce=kinds, keep=True, **options)
    bare = harvest(model, rows(), names, tmp_path / "b", reduce=kinds, **options)
    assert not any(name in bare.shard(0) for name in names)
    for name in names:
        everything = found[name][:]
        flat = everything.reshape(len(found), -1).astype(np.float64)
        reduced, scale = found.reduced[name], flat.std(0)
        for key, array in reduced.items():
            assert np.array_equal(array, bare.reduced[name][key]), key
        close(reduced["mean"], everything.mean(0, dtype=np.float64))
        np.testing.assert_allclose(reduced["variance"].ravel(), flat.var(0), rtol=1e-5)
        apart = np.abs(reduced["covariance"] - np.cov(flat.T, bias=True)) / np.maximum(np.outer(scale, scale), 1e-12)
        assert apart.max() < 1e-5
        exact = np.quantile(flat, (0.0, 0.1, 0.5, 1.0), axis=0, method="inverted_cdf")
        np.testing.assert_allclose(reduced["quantiles"].reshape(4, -1), exact, rtol=1 / 128, atol=2.0**-24)
        order = np.argsort(-flat, axis=0, kind="stable")[:7]
        assert np.array_equal(reduced["top_tokens"].reshape(7, -1), order)
        assert np.array_equal(reduced["top_values"].reshape(7, -1), np.take_along_axis(flat, order, 0))


def test_projections_are_products_with_directions(gpt2: HookedTransformer, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    z, resid = "blocks.1.attn.hook_z", LAST
    shape = (gpt2.cfg.n_heads, gpt2.cfg.d_head)
    directions = {z: random.standard_normal((3, *shape)), resid: random.standard_normal((2, gpt2.cfg.d_model))}
    plain = harvest(gpt2, rows(6), [z, resid], tmp_path / "a", verbose=False)
    found = harvest(
        gpt2, rows(6), [z, resid], tmp_path / "b", project=directions, reduce="top", keep=True, verbose=False
    )
    for name in (z, resid):
        wanted = plain[name][:].reshape(len(plain), -1) @ directions[name].reshape(len(directions[name]), -1).T
        np.testing.assert_allclose(found[name][:], wanted, rtol=1e-4, atol=1e-4)
        assert np.array_equal(found.reduced[name]["top_tokens"][0], found[name][:].argmax(0))


def test_flags_and_set_weights_count(tmp_path: Path) -> None:
    model = HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
    model.set_use_attn_result(True)
    model.set_weights({"blocks.0.attn.W_O": model.W_O[0] * 2})
    tokens = np.asarray([[3, 1, 4, 1, 5]])
    name = "blocks.0.attn.hook_result"
    found = harvest(model, tokens, name, tmp_path / "h", verbose=False)
    close(found[name][:], model.run_with_cache(tokens)[1][name][0])
    other = HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
    with pytest.raises(graphlens.InputError, match="the model 'identity' was"):
        harvest(other, tokens, "blocks.0.hook_attn_out", tmp_path / "h", resume=True, verbose=False)


def test_the_same_from_every_kind_of_corpus(gpt2: HookedTransformer, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    datasets = pytest.importorskip("datasets")
    import pyarrow.parquet as parquet

    texts = ["When John met Mary", "", "Hello world", "ünï"]
    (tmp_path / "a.txt").write_bytes("\ufeffWhen John met Mary\r\n\nHello world\nünï".encode())
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"n": 1, "text": text}) + "\n" for text in texts))
    parquet.write_table(pa.table({"x": [1, 2, 3, 4], "body": texts}), tmp_path / "c.parquet")
    dataset = datasets.Dataset.from_dict({"label": [0, 1, 0, 1], "text": texts})
    dataset.save_to_disk(str(tmp_path / "d"))
    ids = [gpt2.to_tokens(text)[0].tolist() if text else [] for text in texts]
    corpora: list[tuple[Any, dict[str, Any]]] = [
        (texts, {}),
        (tmp_path / "a.txt", {}),
        (str(tmp_path / "b.jsonl"), {}),
        (tmp_path / "c.parquet", {"column": "body"}),
        (dataset, {}),
        (tmp_path / "d", {}),
        (iter(texts), {}),
        (ids, {}),
        (dataset.add_column("input_ids", ids), {"column": "input_ids"}),
    ]
    first: Harvest | None = None
    for number, (corpus, options) in enumerate(corpora):
        found = harvest(gpt2, corpus, LAST, tmp_path / f"h{number}", verbose=False, **options)
        first = first or found
        assert np.array_equal(found.tokens[:], first.tokens[:]), number
        assert np.array_equal(found.documents[:], first.documents[:]), number
        assert np.array_equal(found[LAST][:], first[LAST][:]), number
    np.save(tmp_path / "e.npy", np.asarray([[5, 6], [7, 8]]))
    assert harvest(gpt2, tmp_path / "e.npy", LAST, tmp_path / "n", verbose=False).tokens[:].tolist() == [5, 6, 7, 8]
    several = harvest(gpt2, [tmp_path / "a.txt", tmp_path / "b.jsonl"], LAST, tmp_path / "s", verbose=False)
    assert several.n_documents == 8
    assert len(several) == 2 * len(found)


def test_only_what_is_asked_for_runs(gpt2: HookedTransformer) -> None:
    from graphlens.engine.plan import Plan

    name, tokens = "blocks.1.attn.hook_z", np.asarray([[3, 1, 4]])
    request = gpt2.runner.request(tokens)
    ran = gpt2.runner.run(request, [name], output=False, only=True)
    plan = Plan(reads=(name,))
    engine = gpt2.runner.engine
    assert plan in engine.open_sessions
    assert list(engine.session(plan).outputs) == [name]
    later = [
        hook for hook in engine.hooks(plan) if hook.startswith(("blocks.2", "blocks.3", "blocks.1.mlp", "unembed"))
    ]
    assert later == []  # their nodes are not in the graph
    assert np.array_equal(ran.values[name], gpt2.run_with_cache(tokens)[1][name])
    with gpt2.intervene(graphlens.Scale("blocks.0.attn.hook_z", 2.0, heads=1)):
        edited = gpt2.runner.run(request, [name], output=False, only=True).values[name]
        close(edited, gpt2.run_with_cache(tokens)[1][name])
    assert not np.allclose(edited, ran.values[name])


def test_directions_are_differences_of_means(gpt2: HookedTransformer, tmp_path: Path) -> None:
    given = rows(12)
    found = harvest(gpt2, given, LAST, tmp_path / "h", shard_tokens=100, verbose=False)
    labels = np.arange(12) % 3 == 0
    mine = labels[found.documents[:]]
    wanted = found[LAST][mine].mean(0, dtype=np.float64) - found[LAST][~mine].mean(0, dtype=np.float64)
    close(found.direction(labels, LAST), wanted)
    close(found.direction(mine, LAST, by="token"), wanted)
    with pytest.raises(graphlens.InputError, match="each of the 12 documents"):
        found.direction(labels[:5], LAST)
    with pytest.raises(graphlens.InputError, match="the label True"):
        found.direction(labels & False, LAST)
