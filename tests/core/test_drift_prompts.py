"""Drift over many prompts, against a drift of all of them at once and against its definition over each alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import graphlens
from graphlens import HookedTransformer, drift, drift_prompts
from graphlens.analysis.drift_figures import apart, sums
from graphlens.errors import InputError
from graphlens.pipelines.hub import embedded_model

RNG = np.random.default_rng(4)
FIGURES = ("relative", "cosine", "fresh")


@pytest.fixture(scope="module")
def reference() -> HookedTransformer:
    return HookedTransformer.from_onnx(embedded_model("tiny-llama"), "cpu")


@pytest.fixture(scope="module")
def other() -> HookedTransformer:
    model = HookedTransformer.from_onnx(embedded_model("tiny-llama"), "cpu")
    for name in ("blocks.1.attn.W_O", "blocks.0.mlp.W_in"):
        weight = np.array(model.weights[name])
        model.set_weights({name: weight + RNG.normal(0, 0.1 * weight.std(), weight.shape).astype(weight.dtype)})
    return model


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_many_prompts_are_as_one_batch(reference: HookedTransformer, other: HookedTransformer, batch_size: int) -> None:
    tokens = RNG.integers(1, reference.cfg.d_vocab, (7, 9))
    whole = drift(reference, other, tokens, verbose=False)
    found = drift_prompts(reference, other, tokens, batch_size=batch_size, verbose=False)
    assert [site.hook for site in found.sites] == [site.hook for site in whole.sites]
    assert found.shape == whole.shape == (7, 9)
    assert (found.reference, found.other, found.end, found.only_other) == (
        whole.reference, whole.other, whole.end, whole.only_other,
    )  # fmt: skip
    assert found.logits == pytest.approx(whole.logits, rel=1e-4)
    assert whole.logits > 1e-3
    for one, two in zip(found.sites, whole.sites, strict=True):
        for figure in FIGURES:
            assert one.figure(figure) == pytest.approx(two.figure(figure), rel=1e-3, abs=2e-6, nan_ok=True), one.hook
        assert one.heads == pytest.approx(two.heads, rel=1e-3, abs=2e-6)
        assert one.fresh_heads == pytest.approx(two.fresh_heads, rel=1e-3, abs=2e-6)


def test_prompts_of_any_length_are_summed_and_not_averaged(
    reference: HookedTransformer, other: HookedTransformer
) -> None:
    lengths = (3, 11, 3, 6)
    prompts = [RNG.integers(1, reference.cfg.d_vocab, length) for length in lengths]
    found = drift_prompts(reference, other, prompts, verbose=False)
    assert found.shape == (4, 11)
    for name in ("blocks.1.hook_attn_out", "blocks.3.hook_resid_post"):
        squares = np.zeros(2)
        for prompt in prompts:
            mine, theirs = (model.run_with_cache(prompt[None])[1][name].astype(float) for model in (reference, other))
            squares += [((theirs - mine) ** 2).sum(), (mine**2).sum()]
        assert found[name].relative == pytest.approx(math.sqrt(squares[0] / squares[1]), rel=1e-4)
        each = [drift(reference, other, prompt[None], verbose=False)[name].relative for prompt in prompts]
        assert found[name].relative != pytest.approx(np.mean(each), rel=1e-3)  # a mean would be another figure


def test_equal_models_do_not_drift(reference: HookedTransformer) -> None:
    found = drift_prompts(reference, reference, ["When John and Mary", "a", "went to the store"], verbose=False)
    assert found.logits == 0
    assert {site.relative for site in found.sites} == {0.0}


def test_sums_of_parts_are_those_of_the_whole() -> None:
    mine = RNG.normal(size=(6, 5, 3, 4)).astype(np.float32)
    theirs = mine + RNG.normal(size=mine.shape).astype(np.float32) * 0.1
    for heads in (None, 2):
        added = sums(mine[:2], theirs[:2], None, heads) + sums(mine[2:], theirs[2:], None, heads)
        whole = apart(mine, theirs, None, heads)
        assert added.apart.relative == pytest.approx(whole.relative, rel=1e-6)
        assert added.apart.cosine == pytest.approx(whole.cosine, rel=1e-6)
        assert added.apart.heads == pytest.approx(whole.heads, rel=1e-6)
    one, two = RNG.integers(0, 3, (2, 7, 5))
    added = sums(one[:3], two[:3]) + sums(one[3:], two[3:])
    assert added.apart.relative == (one != two).mean() == apart(one, two).relative
    assert (sums(one[:0], two[:0]) + sums(one[:0], two[:0])).apart.relative == 0
    broken = theirs.copy()
    broken[0, 0, 0, 0] = np.nan
    assert (sums(mine[:2], broken[:2]) + sums(mine[2:], broken[2:])).apart.relative == math.inf


def test_what_does_not_fit_is_refused(reference: HookedTransformer) -> None:
    gpt2 = HookedTransformer.from_onnx(embedded_model("tiny-gpt2"), "cpu")
    prompts: Any
    for prompts, options, said in (
        ([], {}, "empty"),
        ([[0.5, 1.0]], {}, "prompt 0 is float64"),
        (["a"], {"batch_size": 0}, "batch_size"),
        (["a"], {"engine": "spark"}, "engine='spark'"),
    ):
        with pytest.raises(InputError, match=said):
            drift_prompts(reference, reference, prompts, verbose=False, **options)
    with pytest.raises(InputError, match="two versions of one model"):
        drift_prompts(reference, gpt2, ["a"], verbose=False)
    assert graphlens.drift_prompts is drift_prompts


def test_prompts_may_be_any_iterable_and_nothing_else(reference: HookedTransformer) -> None:
    texts = ["When John", "a"]
    found = drift_prompts(reference, reference, (text for text in texts), verbose=False)  # type: ignore[arg-type]
    assert found.shape == drift_prompts(reference, reference, texts, verbose=False).shape
    for wrong in (None, 5):
        with pytest.raises(InputError, match="prompts are texts or rows of token ids, not"):
            drift_prompts(reference, reference, wrong, verbose=False)  # type: ignore[arg-type]
