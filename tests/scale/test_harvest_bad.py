"""What a harvest is not made of: each is a sentence that names it, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphlens
from graphlens import HookedTransformer, InputError, harvest
from graphlens.analysis.reductions import Quantiles, Top
from tests.scale.harvests import LAST, rows


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return HookedTransformer.from_pretrained_no_processing("tiny-gpt2")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt", b"", "the corpus is empty: its 0 documents"),
        ("a.txt", b"\n\n \xff\n", "line 3: not UTF-8"),
        ("a.txt", b"ok\nPK\0\x03\n", "line 2: this is binary"),
        ("a.csv", b"a,b\n", "end in .txt"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2 is neither text nor a row of token ids, but int"),
        (
            "a.jsonl",
            b'{"words": "a"}\n',
            "has no column text, input_ids or tokens: name one with column=. It has words",
        ),
        ("a.jsonl", b"{\n", "line 1: not JSON"),
        ("a.parquet", b"PAR1 no", "not a Parquet file"),
        ("a.npy", b"no", "not an array"),
        ("a.jsonl", b'{"text": "a"}\n{"text": [1, 2]}\n', "document 1 is ids, and those before it are text"),
        ("a.jsonl", b'{"input_ids": [1, 900]}\n', "document 0 of the corpus: token id 900 is outside the vocabulary"),
    ],
)
def test_files_that_are_no_corpus(model: HookedTransformer, tmp_path: Path, name: str, data: bytes, said: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as caught:
        harvest(model, tmp_path / name, LAST, tmp_path / "h", prepend_bos=False, verbose=False)
    assert said in str(caught.value)
    assert not list((tmp_path / "h").iterdir())


@pytest.mark.parametrize(
    ("corpus", "said"),
    [
        ([], "the corpus is empty"),
        ([[], []], "its 2 documents hold no token"),
        ("no such file.txt", "no such file"),
        (3, "a corpus is a path"),
        ([3.5], "neither text nor a row of token ids"),
        ([b"bytes"], "is bytes, not text"),
        (np.zeros((2, 2)), "token ids of a corpus are whole numbers"),
        ({"train": ["a"]}, "this corpus has parts (train)"),
        ([{"label": 1}], "row 0 of the corpus has no column"),
        ([[-1, 3]], "token id -1 is outside"),
        (None, "name a corpus"),
    ],
)
def test_what_is_no_corpus(model: HookedTransformer, tmp_path: Path, corpus: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        harvest(model, corpus, LAST, tmp_path / "h", verbose=False)
    assert said in str(caught.value)
    assert not list((tmp_path / "h").glob("*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"names": "*.hook_nothing"}, "matches no hook point"),
        ({"names": "blocks.9.hook_resid_post"}, "4 layers"),
        ({"names": []}, "empty list"),
        ({"names": lambda name: False}, "matches none"),
        ({"names": ["blocks.0.attn.hook_pattern"]}, "a harvest takes hook points with floats for each token"),
        ({"names": "*.hook_pattern"}, "hold no floats for each token"),
        ({"engine": "slurm"}, "there are 'local' and 'ray'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"too_long": "wrap"}, "too_long='wrap'"),
        ({"positions": "first"}, "positions='first'"),
        ({"context": 0}, "context must be"),
        ({"context": 129}, "context must be"),
        ({"context": 1, "prepend_bos": True}, "a row must hold a token besides BOS"),
        ({"batch_tokens": 0}, "batch_tokens must be"),
        ({"shard_tokens": 1.5}, "shard_tokens must be"),
        ({"too_long": "refuse", "context": 5}, "tokens, and a row holds 5"),
        ({"reduce": "median"}, "'median' is no statistic"),
        ({"reduce": [Top(3), "top"]}, "'top' twice"),
        ({"keep": False}, "leaves nothing to harvest"),
        ({"keep_pad": True, "positions": "last"}, "choose one of the two"),
        ({"project": np.zeros((2, 3))}, "directions of 'blocks.3.hook_resid_post' are numbers [directions, 128]"),
        ({"project": {}}, "has no directions for"),
        ({"column": "text"}, None),
        ({"corpus": [[0], [0]], "keep_bos": False}, "no position of this corpus is kept"),
    ],
)
def test_options_that_do_not_fit(
    model: HookedTransformer, tmp_path: Path, options: dict[str, Any], said: str | None
) -> None:
    given = {"corpus": rows(5), "names": LAST, "verbose": False, **options}
    if said is None:  # lists have no columns, and rows of a list may have
        harvest(model, out=tmp_path / "h", **given)
        return
    with pytest.raises(graphlens.GraphlensError) as caught:
        harvest(model, out=tmp_path / "h", **given)
    assert said in str(caught.value)
    assert not list((tmp_path / "h").glob("*"))


def test_what_is_active_is_refused(model: HookedTransformer, tmp_path: Path) -> None:
    with model.hooks(fwd_hooks=[(LAST, lambda x, hook: x)]), pytest.raises(InputError, match="a Python hook is active"):
        harvest(model, rows(3), LAST, tmp_path / "h")
    with model.intervene(graphlens.Ablate(LAST)), pytest.raises(InputError, match="an intervention is active"):
        harvest(model, rows(3), LAST, tmp_path / "h")


def test_a_model_without_tokenizer_takes_ids_alone(tmp_path: Path) -> None:
    model = HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
    model.tokenizer = None
    assert len(harvest(model, [[1, 2], [3]], LAST, tmp_path / "h", verbose=False)) == 3
    with pytest.raises(InputError, match="tokenizer"):
        harvest(model, ["text"], LAST, tmp_path / "t", verbose=False)
    with pytest.raises(InputError, match="PAD token"):
        harvest(model, [[1, 2]], LAST, tmp_path / "p", keep_pad=True, verbose=False)


def test_numbers_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    model = HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
    model.set_weights({"blocks.0.mlp.b_out": np.full(model.cfg.d_model, 1e6, np.float32)})
    name = "blocks.0.hook_mlp_out"
    with pytest.raises(InputError, match="float16 holds no more than 65504"):
        harvest(model, [[1, 2]], name, tmp_path / "h", dtype="float16", verbose=False)
    assert harvest(model, [[1, 2]], name, tmp_path / "b", dtype="bfloat16", verbose=False)[name][0].max() > 9e5


@pytest.mark.parametrize("kind", [lambda: Top(0), lambda: Top(1.5), lambda: Quantiles(()), lambda: Quantiles((1.5,))])
def test_statistics_that_cannot_be(kind: Any) -> None:
    with pytest.raises(InputError):
        kind()


def test_what_a_harvest_has_not(model: HookedTransformer, tmp_path: Path) -> None:
    kept = harvest(model, rows(4), LAST, tmp_path / "a", verbose=False)
    reduced = harvest(model, rows(4), LAST, tmp_path / "b", reduce="mean", verbose=False)
    with pytest.raises(graphlens.InputError, match="was not harvested"):
        kept["blocks.0.hook_resid_post"]
    with pytest.raises(graphlens.InputError, match="statistics alone"):
        reduced[LAST]
    with pytest.raises(graphlens.InputError, match="without reduce"):
        _ = kept.reduced
    for key in (len(kept), [0, -len(kept) - 1], np.zeros(3, bool), 1.5, [[0]]):
        with pytest.raises(IndexError):
            kept[LAST][key]
    with pytest.raises(InputError, match="there is no row of 128 tokens"):
        kept.save_saelens(tmp_path / "s", LAST)
