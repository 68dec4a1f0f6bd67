"""Sweeps over a data set of pairs against a sweep of each pair, and their statistics against their definitions."""

from __future__ import annotations

import io
import itertools
import statistics as plain
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from graphlens.analysis import statistics
from graphlens.analysis.result import SweepResult
from graphlens.errors import InputError, UnknownHookPoint
from graphlens.metrics import CrossEntropy, LogitDiff, Probability
from graphlens.patching import EffectSummary, Site, grid, sweep, sweep_pairs
from tests.models import MODEL

CFG = MODEL.cfg
RNG = np.random.default_rng(5)
LENGTHS = (5, 7, 5, 5, 6, 7, 5)
CLEAN, CORRUPTED = ([RNG.integers(0, CFG.d_vocab, length) for length in LENGTHS] for _ in range(2))
CORRECT, WRONG = RNG.integers(0, CFG.d_vocab, (2, len(LENGTHS)))
DIFFERENCE = LogitDiff(CORRECT, WRONG)
SITES = grid("z", ("layer", "head"), {"layer": range(CFG.n_layers), "head": range(CFG.n_heads)})


def each_alone(metric_of: Any, sites: Any = SITES, source: Any = None) -> np.ndarray:
    """The values of a sweep of each pair, [..., pair]."""
    found = []
    for row, (clean, corrupted) in enumerate(zip(CLEAN, CORRUPTED, strict=True)):
        given = source if source is not None else MODEL.run_with_cache(clean[None])[1]
        found.append(sweep(MODEL, corrupted[None], sites, given, metric_of(row), verbose=False).values)
    return np.stack(found, -1)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_each_pair_has_the_value_that_it_has_alone(batch_size: int) -> None:
    found = sweep_pairs(
        MODEL, CLEAN, CORRUPTED, SITES, DIFFERENCE, batch_size=batch_size, per_example=True, verbose=False
    )
    assert found.examples is not None
    assert found.examples.axes == ("layer", "head", "batch")
    alone = each_alone(lambda row: LogitDiff(int(CORRECT[row]), int(WRONG[row])))
    np.testing.assert_allclose(found.examples.values, alone, rtol=0, atol=2e-5 * np.abs(alone).max())
    for name, prompts in (("clean", CLEAN), ("corrupted", CORRUPTED)):
        logits = [MODEL(tokens[None])[0, -1] for tokens in prompts]
        wanted = [row[right] - row[wrong] for row, right, wrong in zip(logits, CORRECT, WRONG, strict=True)]
        np.testing.assert_allclose(found.examples.baselines[name], wanted, rtol=0, atol=1e-4)
    effects = alone - alone.dtype.type(0) - np.asarray(found.examples.baselines["corrupted"])
    np.testing.assert_allclose(found.mean.values, effects.mean(-1), rtol=0, atol=1e-4)
    assert found.mean.axes == ("layer", "head")
    assert found.prompts == len(LENGTHS)


def test_a_patch_of_one_pair_equals_a_run_with_a_hook() -> None:
    site = Site("resid_pre", 1, position=-2)
    found = sweep_pairs(MODEL, CLEAN, CORRUPTED, site, DIFFERENCE, per_example=True, verbose=False).examples
    assert found is not None
    for row, (clean, corrupted) in enumerate(zip(CLEAN, CORRUPTED, strict=True)):
        _, cache = MODEL.run_with_cache(clean[None])

        def patch(value: np.ndarray, hook: Any, cache: Any = cache) -> None:
            value[:, -2] = cache[hook.name][:, -2]

        logits = MODEL.run_with_hooks(corrupted[None], fwd_hooks=[("blocks.1.hook_resid_pre", patch)])[0, -1]
        np.testing.assert_allclose(found.values[0, row], logits[CORRECT[row]] - logits[WRONG[row]], rtol=0, atol=1e-4)


def test_several_metrics_normalised_ones_and_other_sources() -> None:
    metrics = {"difference": DIFFERENCE.normalised(), "p": Probability(CORRECT, position=-1)}
    found = sweep_pairs(MODEL, CLEAN, CORRUPTED, SITES, metrics, per_example=True, verbose=False)
    assert found.examples is not None
    assert found.examples.axes == ("metric", "layer", "head", "batch")
    alone = each_alone(
        lambda row: {
            "difference": LogitDiff(int(CORRECT[row]), int(WRONG[row])).normalised(),
            "p": Probability(int(CORRECT[row])),
        }
    )
    np.testing.assert_allclose(found.examples.values, alone, rtol=1e-3, atol=1e-4)
    ablated = sweep_pairs(MODEL, CLEAN, CORRUPTED, SITES, [DIFFERENCE], source="zero", per_example=True, verbose=False)
    assert ablated.examples is not None
    zeroed = each_alone(lambda row: [LogitDiff(int(CORRECT[row]), int(WRONG[row]))], source="zero")
    np.testing.assert_allclose(ablated.examples.values, zeroed, rtol=0, atol=1e-4)


def test_a_mean_is_of_all_pairs_or_refused() -> None:
    """A mean over a batch would be another one for each batch size, without a word."""
    same = [row for row, length in enumerate(LENGTHS) if length == 5]
    clean, corrupted = ([tokens[row] for row in same] for tokens in (CLEAN, CORRUPTED))
    metric = LogitDiff(CORRECT[same], WRONG[same])
    options: dict[str, Any] = {"source": "mean", "per_example": True, "verbose": False}
    with pytest.raises(InputError, match="2 batches"):
        sweep_pairs(MODEL, clean, corrupted, SITES, metric, batch_size=2, **options)
    found = sweep_pairs(MODEL, clean, corrupted, SITES, metric, **options).examples
    assert found is not None
    each = LogitDiff(CORRECT[same], WRONG[same], reduction="none")
    together = sweep(MODEL, np.stack(corrupted), SITES, "mean", each, verbose=False)
    np.testing.assert_allclose(found.values, together.values, rtol=0, atol=1e-5)


def test_a_cache_of_as_many_rows_as_a_batch_is_refused() -> None:
    """Its rows would fit every batch, and be those of other prompts in all but one."""
    same = [row for row, length in enumerate(LENGTHS) if length == 5]
    clean, corrupted = ([tokens[row] for row in same] for tokens in (CLEAN, CORRUPTED))
    _, cache = MODEL.run_with_cache(np.stack(clean[:2]))
    metric = LogitDiff(CORRECT[same], WRONG[same])
    with pytest.raises(InputError, match="a cache holds the rows of one run"):
        sweep_pairs(MODEL, clean, corrupted, SITES, metric, source=cache, batch_size=2, verbose=False)


def test_as_many_pairs_as_heads_and_positions() -> None:
    """Where all sizes are one, an axis taken for another would fit."""
    count = CFG.n_heads
    rng = np.random.default_rng(8)
    clean, corrupted = rng.integers(0, CFG.d_vocab, (2, count, count))
    correct, wrong = rng.integers(0, CFG.d_vocab, (2, count))
    places = rng.integers(0, count, count)
    sites = grid("z", ("layer", "head", "pos"), {"layer": [1], "head": range(count), "pos": range(count)})
    metric = LogitDiff(correct, wrong, position=places)
    found = sweep_pairs(MODEL, clean, corrupted, sites, metric, batch_size=2, per_example=True, verbose=False).examples
    assert found is not None
    for row in range(count):
        _, cache = MODEL.run_with_cache(clean[row][None])
        own = LogitDiff(int(correct[row]), int(wrong[row]), position=int(places[row]))
        alone = sweep(MODEL, corrupted[row][None], sites, cache, own, verbose=False).values
        np.testing.assert_allclose(found.values[..., row], alone, rtol=0, atol=1e-4)


def test_text_goes_in_pairs_too() -> None:
    from graphlens import HookedTransformer

    model = HookedTransformer.from_pretrained("tiny-gpt2")
    clean = ["When John and Mary went to the store, John gave a drink to", "John saw Mary"]
    corrupted = ["When John and Mary went to the store, Mary gave a drink to", "Mary saw John"]
    metric = LogitDiff([" Mary", " Mary"], [" John", " John"])
    found = sweep_pairs(model, clean, corrupted, Site("z", 1, head=2), metric, per_example=True, verbose=False)
    assert found.examples is not None
    for row in range(2):
        _, cache = model.run_with_cache(clean[row])
        alone = sweep(
            model, corrupted[row], Site("z", 1, head=2), cache, LogitDiff(" Mary", " John"), verbose=False
        ).values
        np.testing.assert_allclose(found.examples.values[:, row], alone, rtol=0, atol=1e-4)


# Statistics


VALUES = RNG.normal(0.7, 1.0, (2, 3, 6))


def test_the_standard_error_is_that_of_the_sample() -> None:
    found = statistics.standard_error(VALUES)
    for index in np.ndindex(2, 3):
        assert found[index] == pytest.approx(plain.stdev(VALUES[index].tolist()) / 6**0.5, rel=1e-12)
    assert np.isnan(statistics.standard_error(VALUES[..., :1])).all()


def test_the_p_value_counts_the_patterns_of_signs() -> None:
    exact = statistics.sign_flip_p(VALUES, 64, 0)
    for index in np.ndindex(2, 3):
        own = abs(sum(VALUES[index]))
        sums = [abs(sum(v * s for v, s in zip(VALUES[index], signs, strict=True))) for signs in _signs(6)]
        assert exact[index] == sum(total >= own - 1e-9 for total in sums) / 64
    assert statistics.sign_flip_p(np.ones((1, 5)), 32, 0) == 2 / 32
    assert statistics.sign_flip_p(np.zeros((1, 5)), 32, 0) == 1
    drawn = statistics.sign_flip_p(VALUES, 63, 0)  # one fewer than there are: drawn
    assert (drawn >= 1 / 64).all()
    many = np.concatenate([VALUES, VALUES[..., :5]], -1)
    close = statistics.sign_flip_p(many, 2**11 - 1, 3) - statistics.sign_flip_p(many, 2**11, 3)
    assert np.abs(close).max() < 0.05  # some 4.5 standard deviations of such a share


def _signs(count: int) -> Any:
    return itertools.product((1, -1), repeat=count)


def test_the_interval_is_that_of_all_draws() -> None:
    values = np.array([[0.0, 1.0, 10.0]])
    means = sorted(sum(draw) / 3 for draw in itertools.product(values[0], repeat=3))  # 27, equally likely
    low, high = statistics.bootstrap_interval(values, 0.8, 40_000, 1)
    below = [np.mean(np.array(means) < end) for end in (low[0], high[0])]
    upto = [np.mean(np.array(means) <= end + 1e-9) for end in (low[0], high[0])]
    assert below[0] <= 0.1 <= upto[0]
    assert below[1] <= 0.9 <= upto[1]
    same = statistics.bootstrap_interval(np.full((2, 4), 3.5), 0.95, 100, 0)
    np.testing.assert_allclose(same, 3.5)


def test_an_interval_holds_the_true_mean_about_as_often_as_it_says() -> None:
    samples = np.random.default_rng(2).normal(2.0, 3.0, (2_000, 30))
    low, high = statistics.bootstrap_interval(samples, 0.9, 1_000, 3)
    covered = ((low <= 2.0) & (high >= 2.0)).mean()
    assert 0.84 < covered < 0.92  # percentile intervals of 30 values cover a little less than they say


def test_many_places_are_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = statistics.bootstrap_interval(VALUES, 0.9, 50, 4), statistics.sign_flip_p(VALUES, 64, 4)
    monkeypatch.setattr(statistics, "AT_ONCE", 100)
    parts = statistics.bootstrap_interval(VALUES, 0.9, 50, 4), statistics.sign_flip_p(VALUES, 64, 4)
    np.testing.assert_allclose(whole[0], parts[0], rtol=1e-12)
    np.testing.assert_array_equal(whole[1], parts[1])


def results(values: np.ndarray, corrupted: Any = 0.0) -> SweepResult:
    labels = {"site": [f"s{i}" for i in range(len(values))], "batch": [str(i) for i in range(values.shape[1])]}
    return SweepResult(values, ("site", "batch"), labels, {"corrupted": np.full(values.shape[1], corrupted)})


def test_a_summary_of_a_sweep_is_of_its_effects() -> None:
    values = RNG.normal(size=(4, 9))
    found = results(values, 0.5).summary(0.9, 300, 7)
    effects = values - 0.5
    np.testing.assert_allclose(found.mean.values, effects.mean(1))
    np.testing.assert_allclose(found.standard_error.values, statistics.standard_error(effects))
    low, high = statistics.bootstrap_interval(effects, 0.9, 300, 7)
    np.testing.assert_allclose((found.low.values, found.high.values), (low, high))
    np.testing.assert_allclose(found.p_value.values, statistics.sign_flip_p(effects, 300, 7))
    order = np.argsort(-np.abs(effects.mean(1)))
    top = found.top(2)
    assert [labels["site"] for labels, _ in top] == [f"s{i}" for i in order[:2]]
    assert top[0][1]["p_value"] == found.p_value.values[order[0]]


def test_a_table_shows_the_largest_effects() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(results(np.array([[1.0, 3.0], [-8.0, -9.0]])).summary())
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["s1", "-8.5", "-9", "to", "-8", "0.5"] in lines
    assert isinstance(results(np.ones((1, 2))).summary(), EffectSummary)


# Refused


@pytest.mark.parametrize(
    ("clean", "corrupted", "metric", "options", "said"),
    [
        (CLEAN[:2], CORRUPTED[:3], DIFFERENCE, {}, "2 clean prompts and 3 corrupted"),
        ([CLEAN[0]], [CORRUPTED[1]], DIFFERENCE, {}, "pair 0 has 5 clean tokens and 7"),
        ([], [], DIFFERENCE, {}, "empty"),
        ([CLEAN[0].astype(float)], [CORRUPTED[0]], DIFFERENCE, {}, "prompt 0 is float64"),
        (CLEAN[:2], CORRUPTED[:2], DIFFERENCE, {}, "is of 7 prompts; there are 2"),
        (CLEAN, CORRUPTED, lambda logits: 0, {}, "does not say what each prompt's is"),
        (CLEAN, CORRUPTED, [], {}, "empty"),
        (CLEAN, CORRUPTED, DIFFERENCE, {"batch_size": 0}, "batch_size"),
        (CLEAN, CORRUPTED, DIFFERENCE, {"confidence": 1.5}, "confidence"),
        (CLEAN, CORRUPTED, DIFFERENCE, {"resamples": 0}, "resamples"),
        (CLEAN, CORRUPTED, DIFFERENCE, {"source": "nothing"}, "nothing"),
        (["a b"], ["a"], LogitDiff(1, 2), {}, "pair 0 has 3 clean tokens and 2"),
    ],
)
def test_what_does_not_fit_is_refused(
    clean: Any, corrupted: Any, metric: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        sweep_pairs(MODEL, clean, corrupted, SITES, metric, verbose=False, **options)


def test_results_without_prompts_or_with_holes_have_no_summary() -> None:
    with pytest.raises(InputError, match="no axis 'batch'"):
        SweepResult(np.ones(2), ("site",), {"site": ["a", "b"]}).summary()
    with pytest.raises(InputError, match="not done yet"):
        results(np.array([[1.0, np.nan]])).summary()
    with pytest.raises(InputError, match="does not know"):
        SweepResult(np.ones((1, 2)), ("site", "batch"), {"site": ["a"], "batch": ["0", "1"]}).summary()
    with pytest.raises(UnknownHookPoint):
        sweep_pairs(MODEL, CLEAN, CORRUPTED, Site("blocks.0.hook_nothing"), DIFFERENCE, verbose=False)


def test_cross_entropy_over_positions_goes_by_prompt() -> None:
    targets = [np.roll(tokens, -1) for tokens in CORRUPTED]
    same = [row for row, length in enumerate(LENGTHS) if length == 5]
    metric = CrossEntropy(np.stack([targets[row] for row in same]), position=None)
    found = sweep_pairs(
        MODEL,
        [CLEAN[row] for row in same],
        [CORRUPTED[row] for row in same],
        Site("mlp_out", 0),
        metric,
        batch_size=3,
        per_example=True,
        verbose=False,
    ).examples
    assert found is not None
    for column, row in enumerate(same):
        _, cache = MODEL.run_with_cache(CLEAN[row][None])
        alone = sweep(
            MODEL,
            CORRUPTED[row][None],
            Site("mlp_out", 0),
            cache,
            CrossEntropy(targets[row][None], position=None),
            verbose=False,
        )
        np.testing.assert_allclose(found.values[0, column], alone.values[0], rtol=0, atol=1e-5)
