"""Padding counts for nothing: metrics, sweeps, gradients and attribution of a batch give each text what it gives alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from graphlens.attribution import attribution_patch, direct_logit_attribution, edge_attribution, faithfulness
from graphlens.errors import InputError
from graphlens.metrics import CrossEntropy, KLDivergence, LogitDiff, Metric, Probability
from graphlens.patching import (
    Mean,
    Noise,
    Site,
    generic_activation_patch,
    get_act_patch_attn_head_out_all_pos,
    layer_head_vector_patch_setter,
    path_patch,
    sweep,
)
from graphlens.utils import lm_cross_entropy_loss
from tests.intervention_specs import close
from tests.models import MODEL

CFG = MODEL.cfg
CLEAN = [
    "When John and Mary went to the store, John gave a drink to",
    "Mary and John went",
    "Then Mary said that John went",
]
CORRUPTED = [
    "When Tom and Mary went to the store, Tom gave a drink to",
    "John and John went",
    "Then Mary said that Mary went",
]
ALONE = [MODEL.to_tokens(text)[0] for text in CORRUPTED]
LENGTHS = np.asarray([len(ids) for ids in ALONE])
LONGEST = int(LENGTHS.max())
HEADS = [Site("z", layer, head=head) for layer in (0, 2) for head in (1, 3)]
SITES = [*HEADS, Site("resid_pre", 1, position=-1), Site("attn_out", 3), Site("pattern", 1, position=-2, head=0)]
DIFFERENCE = LogitDiff(" Mary", " John", reduction="none")
SIDED = pytest.mark.parametrize("side", ["left", "right"])


def batch(side: str) -> tuple[np.ndarray, np.ndarray]:
    """The corrupted prompts as tokens and their mask; what is padding is no token that the tokenizer pads with."""
    assert len(set(LENGTHS)) == 3
    tokens, mask = np.full((3, LONGEST), 7), np.zeros((3, LONGEST), int)
    for row, ids in enumerate(ALONE):
        place = slice(LONGEST - len(ids), None) if side == "left" else slice(0, len(ids))
        tokens[row, place], mask[row, place] = ids, 1
    return tokens, mask


def real(mask: np.ndarray, array: np.ndarray, row: int) -> np.ndarray:
    return array[row][mask[row].astype(bool)]


def losses(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """-log p of each next token of one text, by arithmetic."""
    exact = logits.astype(np.float64)
    return np.log(np.exp(exact).sum(-1))[:-1] - exact[np.arange(len(ids) - 1), ids[1:]]


def divergences(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    p, q = (
        np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(-1, keepdims=True) for x in (reference, logits)
    )
    return (p * np.log(p / q)).sum(-1)


# Metrics


@SIDED
def test_a_mean_over_positions_is_of_the_real_tokens(side: str) -> None:
    tokens, mask = batch(side)
    logits = MODEL(tokens, attention_mask=mask)
    reference = np.random.default_rng(0).standard_normal(logits.shape).astype(np.float32)
    each = [losses(MODEL(ids[None])[0], ids) for ids in ALONE]
    apart = [divergences(real(mask, reference, row), MODEL(ids[None])[0]) for row, ids in enumerate(ALONE)]
    made: list[tuple[Callable[..., Metric], list[np.ndarray]]] = [
        (lambda **options: CrossEntropy(tokens, position=None, **options), each),
        (lambda **options: KLDivergence(reference, position=None, **options), apart),
    ]
    for make, expected in made:
        per_prompt = make(reduction="none", mask=mask)(logits)
        np.testing.assert_allclose(per_prompt, [values.mean() for values in expected], rtol=1e-5)
        token_mean = np.concatenate(expected).mean()
        for metric in (make(mask=mask), make().masked(mask), make(mask=mask.astype(bool)).masked(np.ones_like(mask))):
            assert float(metric(logits)) == pytest.approx(token_mean, rel=1e-5)
        assert abs(float(make()(logits)) - token_mean) > 0.1  # padding would count
    loss = lm_cross_entropy_loss(logits, tokens, mask)
    assert float(made[0][0](mask=mask)(logits)) == pytest.approx(float(loss), rel=1e-6)


@SIDED
def test_what_padding_holds_changes_nothing(side: str) -> None:
    tokens, mask = batch(side)
    logits = MODEL(tokens, attention_mask=mask)
    odd = np.where(mask[..., None] == 1, logits, np.inf)
    odd[..., 0][mask == 0] = np.nan
    reference = np.zeros_like(logits)
    for metric in (CrossEntropy(tokens, position=None, mask=mask), KLDivergence(reference, position=None, mask=mask)):
        with np.errstate(invalid="ignore"):
            assert float(metric(odd)) == float(metric(logits))


@SIDED
@pytest.mark.parametrize("kind", ["loss", "KL"])
def test_gradients_are_those_of_each_text_alone(side: str, kind: str) -> None:
    tokens, mask = batch(side)
    reference = np.random.default_rng(1).standard_normal((*tokens.shape, CFG.d_vocab)).astype(np.float32)

    def metric(ids: np.ndarray, logits: np.ndarray) -> Metric:
        return CrossEntropy(ids, position=None) if kind == "loss" else KLDivergence(logits, position=None)

    name = "blocks.2.hook_resid_pre"
    found = MODEL.gradients(tokens, metric(tokens, reference), name, attention_mask=mask)[name]
    counts = LENGTHS - 1 if kind == "loss" else LENGTHS
    for row, ids in enumerate(ALONE):
        own = metric(ids[None], real(mask, reference, row)[None])
        alone = MODEL.gradients(ids[None], own, name)[name][0] * counts[row] / counts.sum()
        np.testing.assert_allclose(real(mask, found, row), alone, atol=1e-4 * np.abs(alone).max())
        assert not found[row][mask[row] == 0].any()


@SIDED
def test_slopes_are_the_derivative(side: str) -> None:
    tokens, mask = batch(side)
    rng = np.random.default_rng(2)
    logits, way = rng.standard_normal((2, *tokens.shape, 1500))
    small = tokens % 1500
    for metric in (CrossEntropy(small, position=None, mask=mask), KLDivergence(way, position=None, mask=mask)):
        scores = metric.needs(*small.shape).gather(logits)
        slope = float((metric.slopes(scores) * metric.needs(*small.shape).gather(way)).sum())
        step = 1e-5
        up, down = (float(metric(logits + sign * step * way)) for sign in (1, -1))
        assert slope == pytest.approx((up - down) / (2 * step), rel=1e-6)


@pytest.mark.parametrize(
    "metric",
    [
        DIFFERENCE,
        Probability(5),
        CrossEntropy(5),
        KLDivergence(np.zeros((3, CFG.d_vocab), np.float32)),
        DIFFERENCE.normalised(2, 1),
    ],
    ids=lambda metric: metric.name,
)
def test_a_metric_that_would_read_padding_is_refused(metric: Metric) -> None:
    tokens, mask = batch("right")
    bound = metric.bound(MODEL.to_single_token)
    with pytest.raises(InputError, match=r"position is -1, which is padding in prompt 1: pad prompts on the left"):
        bound.masked(mask)
    with pytest.raises(InputError, match="which is padding in prompt 1"):
        sweep(MODEL, tokens, HEADS, "zero", metric.plain, attention_mask=mask, verbose=False)
    assert bound.masked(batch("left")[1]) is not None
    assert bound.masked(None) == bound


def test_masks_that_are_none() -> None:
    tokens, mask = batch("left")
    for wrong, says in (
        (mask[:, 1:], "its target"),
        (mask[0], r"1 at real tokens and 0 at padding, \[b, p\]"),
        (mask * 2, "must be 1 at real tokens"),
        (mask * 0, "a real token in each prompt"),
    ):
        with pytest.raises(InputError, match=says):
            CrossEntropy(tokens, position=None, mask=wrong)
    single = np.zeros_like(mask)
    single[:, -1] = 1
    with pytest.raises(InputError, match="leaves nothing of prompt 0"):
        CrossEntropy(tokens, position=None, mask=single)
    some = mask.copy()
    some[1] = single[1]
    with pytest.raises(InputError, match="leaves nothing of prompt 1"):
        CrossEntropy(tokens, position=None, reduction="none", mask=some)
    assert np.isfinite(CrossEntropy(tokens, position=None, mask=some)(MODEL(tokens, attention_mask=mask)))


def test_a_masked_token_between_real_ones_is_no_padding() -> None:
    logits = np.random.default_rng(6).standard_normal((1, 5, 9))
    mask = [[0, 1, 0, 1, 0]]
    for position in (1, 2, 3, -3):
        for plain in (LogitDiff(2, 7, position), CrossEntropy(4, position)):
            assert float(plain.masked(mask)(logits)) == float(plain(logits))
    for position in (0, 4, -1):
        with pytest.raises(InputError, match="which is padding in prompt 0"):
            LogitDiff(2, 7, position).masked(mask)
        with pytest.raises(InputError, match="which is padding in prompt 0"):
            CrossEntropy(4, position, mask=mask)


@pytest.mark.parametrize("position", [0, None])
def test_a_mask_of_prompts_of_another_length_is_refused(position: int | None) -> None:
    tokens, mask = batch("right")
    reference = np.zeros((*tokens.shape, 9) if position is None else (3, 9), np.float32)
    target = tokens % 9 if position is None else 5
    for metric in (
        KLDivergence(reference, position=position, mask=mask),
        CrossEntropy(target, position=position, mask=mask),
    ):
        assert np.isfinite(metric(np.zeros((3, LONGEST, 9))))
        with pytest.raises(InputError, match=rf"mask has {LONGEST} positions; there are {LONGEST + 1}\."):
            metric(np.zeros((3, LONGEST + 1, 9)))


# Lists of texts


def alone(text: str, run: Callable[[Any, Any], Any], clean: str) -> Any:
    _, cache = MODEL.run_with_cache(clean)
    return np.asarray(run(text, cache).values)


def both(run: Callable[[Any, Any], Any]) -> None:
    """Each row of a list of texts is the text alone; the list's values have the prompts on their last axis."""
    _, cache = MODEL.run_with_cache(CLEAN, padding_side="left")
    found = np.asarray(run(CORRUPTED, cache).values)
    for row, (text, clean) in enumerate(zip(CORRUPTED, CLEAN, strict=True)):
        close(found[..., row], alone(text, run, clean)[..., 0], 1e-4)


def test_clean_and_corrupted_texts_are_as_long() -> None:
    assert [MODEL.to_tokens(text).shape for text in CLEAN] == [MODEL.to_tokens(text).shape for text in CORRUPTED]


@pytest.mark.parametrize("recompute", [True, False])
def test_a_sweep_of_a_list_of_texts(recompute: bool) -> None:
    both(lambda texts, cache: sweep(MODEL, texts, SITES, cache, DIFFERENCE, recompute=recompute, verbose=False))
    both(lambda texts, cache: sweep(MODEL, texts, SITES, "zero", DIFFERENCE, recompute=recompute, verbose=False))


@pytest.mark.parametrize("recompute", [True, False])
def test_a_sweep_of_the_loss_of_a_list_of_texts(recompute: bool) -> None:
    def run(texts: Any, cache: Any) -> Any:
        ids = MODEL.to_tokens(texts, padding_side="left")
        metric = CrossEntropy(ids, position=None, reduction="none")
        return sweep(MODEL, texts, SITES, cache, metric, recompute=recompute, verbose=False)

    both(run)


def test_path_patching_of_a_list_of_texts() -> None:
    both(lambda texts, cache: path_patch(MODEL, texts, cache, DIFFERENCE, verbose=False))
    both(
        lambda texts, cache: path_patch(
            MODEL, texts, cache, DIFFERENCE, [Site("q", 2, head=1)], HEADS[:2], verbose=False
        )
    )


@pytest.mark.parametrize("steps", [0, 2])
def test_attribution_of_a_list_of_texts(steps: int) -> None:
    """The mean over the prompts is the mean of each alone."""
    metric = LogitDiff(" Mary", " John")

    def estimate(texts: Any, cache: Any) -> np.ndarray:
        found = attribution_patch(MODEL, texts, SITES, cache, metric, steps=steps, verbose=False)
        edges = edge_attribution(MODEL, texts, cache, metric, steps=steps)
        return np.concatenate([found.values, edges.values])

    _, cache = MODEL.run_with_cache(CLEAN, padding_side="left")
    every = [estimate(text, MODEL.run_with_cache(clean)[1]) for text, clean in zip(CORRUPTED, CLEAN, strict=True)]
    close(estimate(CORRUPTED, cache), np.mean(every, 0), 1e-4)


def test_circuits_and_direct_attribution_of_a_list_of_texts() -> None:
    metric = LogitDiff(" Mary", " John")

    def values(texts: Any, cache: Any) -> np.ndarray:
        kept = {"some": ["embed->logits", "embed->L0MLP", "L0MLP->logits", "L1H2->logits"]}
        found = faithfulness(MODEL, texts, cache, metric, kept)
        return np.concatenate([found.values, direct_logit_attribution(MODEL, texts, metric).values])

    _, cache = MODEL.run_with_cache(CLEAN, padding_side="left")
    every = [values(text, MODEL.run_with_cache(clean)[1]) for text, clean in zip(CORRUPTED, CLEAN, strict=True)]
    close(values(CORRUPTED, cache), np.mean(every, 0), 1e-4)


def test_gradients_of_a_list_of_texts() -> None:
    name = "blocks.1.attn.hook_z"
    metric = LogitDiff(" Mary", " John")
    found = MODEL.gradients(CORRUPTED, metric, name)[name]
    for row, text in enumerate(CORRUPTED):
        own = MODEL.gradients(text, metric, name)[name][0] / len(CORRUPTED)
        np.testing.assert_allclose(found[row, LONGEST - len(own) :], own, atol=1e-4 * np.abs(own).max())


def test_transformer_lens_s_functions_of_a_list_of_texts() -> None:
    _, cache = MODEL.run_with_cache(CLEAN, padding_side="left")
    metric = LogitDiff(" Mary", " John")
    every = [
        get_act_patch_attn_head_out_all_pos(MODEL, text, MODEL.run_with_cache(clean)[1], metric)
        for text, clean in zip(CORRUPTED, CLEAN, strict=True)
    ]
    expected = np.mean(every, 0)
    close(get_act_patch_attn_head_out_all_pos(MODEL, CORRUPTED, cache, metric), expected, 1e-4)
    for setter in (layer_head_vector_patch_setter, lambda *args: layer_head_vector_patch_setter(*args)):
        found = generic_activation_patch(MODEL, CORRUPTED, cache, metric, setter, "z", ["layer", "head"])
        close(found, expected, 1e-4)


@pytest.mark.parametrize("tail", ["attn_scores", "pattern", "resid_pre"])
def test_a_mean_is_of_the_real_entries(tail: str) -> None:
    tokens, mask = batch("left")
    name = Site(tail, 1).hook
    _, cache = MODEL.run_with_cache(tokens, attention_mask=mask, names_filter=name)
    array = cache[name]
    found = np.broadcast_to(Mean().value(name, array, mask), array.shape)
    for row, query in np.argwhere(mask):
        if tail == "resid_pre":
            np.testing.assert_allclose(found[row, query], array[mask == 1].mean(0), rtol=1e-4, atol=1e-4)
            continue
        for key in np.flatnonzero(mask[row][: query + 1]):
            rows = [other for other in range(3) if mask[other, query] and mask[other, key]]
            np.testing.assert_allclose(found[row, :, query, key], array[rows, :, query, key].mean(0), rtol=1e-4)
        hidden = np.flatnonzero(mask[row] == 0)
        np.testing.assert_array_equal(found[row, :, query, hidden], array[row, :, query, hidden])


def test_noise_has_the_spread_of_the_real_tokens() -> None:
    _, mask = batch("left")
    array = np.random.default_rng(0).standard_normal((*mask.shape, 5)).astype(np.float32)
    far = np.where(mask[..., None] == 1, array, 1e4).astype(np.float32)
    with_padding = Noise(1.0).value("x", far, mask) - far
    without = Noise(1.0).value("x", array, mask) - array
    np.testing.assert_allclose(with_padding[mask == 1], without[mask == 1], atol=1e-5)


# Sides and masks


def test_a_cache_padded_on_the_other_side_is_refused() -> None:
    _, cache = MODEL.run_with_cache(CLEAN)  # on the right, as TransformerLens does
    for run in (
        lambda: sweep(MODEL, CORRUPTED, HEADS, cache, DIFFERENCE, verbose=False),
        lambda: path_patch(MODEL, CORRUPTED, cache, DIFFERENCE, verbose=False),
        lambda: edge_attribution(MODEL, CORRUPTED, cache, LogitDiff(" Mary", " John")),
        lambda: generic_activation_patch(
            MODEL, CORRUPTED, cache, DIFFERENCE, lambda new, index, old: old, "z", ["layer"]
        ),
    ):
        with pytest.raises(InputError, match="padded on the right, and those that are patched are padded on the left"):
            run()
    position = (LENGTHS - 1).tolist()
    found = sweep(
        MODEL,
        CORRUPTED,
        HEADS,
        cache,
        LogitDiff(" Mary", " John", position, "none"),
        padding_side="right",
        verbose=False,
    )
    _, left = MODEL.run_with_cache(CLEAN, padding_side="left")
    close(found.values, sweep(MODEL, CORRUPTED, HEADS, left, DIFFERENCE, verbose=False).values, 1e-4)


def test_an_attention_mask_that_calls_padding_real_is_refused() -> None:
    with pytest.raises(InputError, match="attention_mask is 1 at padding of text 1"):
        sweep(MODEL, CORRUPTED, HEADS, "zero", DIFFERENCE, attention_mask=np.ones((3, LONGEST), int), verbose=False)


def test_a_source_that_does_not_fit_is_refused() -> None:
    class Other:
        def value(self, hook: str, corrupted: np.ndarray, mask: Any) -> np.ndarray:
            return np.zeros((3, 2))

    with pytest.raises(InputError, match=r"Other.value gave \[3, 2\]"):
        sweep(MODEL, CORRUPTED, HEADS, Other(), DIFFERENCE, verbose=False)


def test_the_loss_of_texts_padded_on_the_right_warns_once() -> None:
    model = MODEL.__copy__()
    with pytest.warns(UserWarning, match="this loss counts the padding, as TransformerLens's does"):
        counted = model(CORRUPTED, return_type="loss")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(CORRUPTED, return_type="loss") == counted
        MODEL.__copy__()(CORRUPTED[:1], return_type="loss")
        MODEL.__copy__()(CORRUPTED, return_type="logits")
        left = MODEL.__copy__()(CORRUPTED, return_type="loss", padding_side="left")
    token_mean = np.concatenate([losses(MODEL(ids[None])[0], ids) for ids in ALONE]).mean()
    assert float(left) == pytest.approx(token_mean, rel=1e-4)
    assert abs(float(counted) - token_mean) > 0.1
