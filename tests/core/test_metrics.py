"""Metrics: each against its formula written out, parts against whole logits, and what is refused."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import graphlens
from graphlens import metrics
from graphlens.analysis.metrics import Normalised
from graphlens.errors import InputError
from graphlens.metrics import CrossEntropy, KLDivergence, LogitDiff, Metric, Needs, Probability, normalised
from graphlens.utils import lm_cross_entropy_loss

few = settings(max_examples=40, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
BATCH, LENGTH, VOCAB = 3, 5, 11
RNG = np.random.default_rng(7)
LOGITS = RNG.normal(0, 3, (BATCH, LENGTH, VOCAB))
OTHER = RNG.normal(0, 3, (BATCH, LENGTH, VOCAB))
TOKENS = RNG.integers(0, VOCAB, (BATCH, LENGTH))
IDS, WRONG, PLACES = [2, 9, 0], [4, 1, 10], [1, -1, 3]
NAMES = {" a": 2, " b": 9, " café": 0, "Ġ": 4}

METRICS: dict[str, Metric] = {
    "diff": LogitDiff(2, 7),
    "diff per prompt": LogitDiff(IDS, WRONG, position=PLACES, reduction="none"),
    "diff mixed": LogitDiff(3, WRONG, position=0),
    "probability": Probability(VOCAB - 1, position=-LENGTH),
    "probability per prompt": Probability(IDS, position=PLACES, reduction="none"),
    "cross-entropy": CrossEntropy(IDS, position=2),
    "cross-entropy per prompt": CrossEntropy(5, position=PLACES, reduction="none"),
    "loss": CrossEntropy(TOKENS, position=None),
    "loss per prompt": CrossEntropy(TOKENS, position=None, reduction="none"),
    "KL": KLDivergence(OTHER),
    "KL per prompt": KLDivergence(OTHER, position=PLACES, reduction="none"),
    "KL at the position": KLDivergence(OTHER[:, 2], position=2),
    "KL everywhere": KLDivergence(OTHER, position=None),
}
EVERY = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS.keys())


def probabilities(row: Any) -> list[float]:
    """Softmax of one row, in plain Python."""
    weights = [math.exp(x - max(row)) for x in row]
    return [weight / math.fsum(weights) for weight in weights]


def entry(value: Any, prompt: int) -> Any:
    return value if np.ndim(value) == 0 else value[prompt]


def by_hand(metric: Metric, logits: Any) -> list[float]:
    """One value a prompt, a number at a time."""
    found = []
    for prompt, rows in enumerate(logits):
        places = range(len(rows)) if metric.position is None else [entry(metric.position, prompt)]
        if isinstance(metric, LogitDiff):
            row = rows[places[0]]
            found.append(row[entry(metric.correct, prompt)] - row[entry(metric.incorrect, prompt)])
        elif isinstance(metric, Probability):
            found.append(probabilities(rows[places[0]])[entry(metric.token, prompt)])
        elif isinstance(metric, CrossEntropy):
            pairs = (
                [(p, metric.target[prompt][p + 1]) for p in list(places)[:-1]]
                if metric.position is None
                else [(places[0], entry(metric.target, prompt))]
            )
            found.append(-sum(math.log(probabilities(rows[p])[token]) for p, token in pairs) / len(pairs))
        else:
            assert isinstance(metric, KLDivergence)
            total = 0.0
            for place in places:
                expected = metric.reference[prompt]
                wanted = probabilities(expected if expected.ndim == 1 else expected[place])
                total += sum(p * math.log(p / q) for p, q in zip(wanted, probabilities(rows[place]), strict=True))
            found.append(total / len(places))
    return found


@EVERY
def test_each_is_its_formula(metric: Metric) -> None:
    expected = by_hand(metric, LOGITS)
    value = metric(LOGITS)
    assert value.dtype == np.float64
    assert value.shape == ((BATCH,) if metric.reduction == "none" else ())
    np.testing.assert_allclose(value, expected if metric.reduction == "none" else np.mean(expected), rtol=1e-12)
    np.testing.assert_allclose(replace(metric, reduction="none")(LOGITS), expected, rtol=1e-12)


@EVERY
def test_the_parts_it_needs_are_enough(metric: Metric) -> None:
    needs = metric.needs(BATCH, LENGTH)
    for array, dtype in ((needs.positions, np.int64), (needs.tokens, np.int64)):
        assert array is None or array.dtype == dtype
    part = needs.gather(LOGITS)
    positions = LENGTH if needs.positions is None else needs.positions.shape[-1]
    assert part.shape == (BATCH, positions, VOCAB if needs.tokens is None else needs.tokens.shape[1])
    assert needs.positions is None or (needs.positions.min() >= 0 and needs.positions.max() < LENGTH)
    values = metric.of(part)
    assert values.shape == (BATCH,)
    np.testing.assert_array_equal(metric.reduced(values), metric(LOGITS))


@EVERY
def test_leading_axes_are_variants(metric: Metric) -> None:
    variants = np.random.default_rng(3).normal(size=(2, 4, BATCH, LENGTH, VOCAB))
    values = metric.of(metric.needs(BATCH, LENGTH).gather(variants))
    assert values.shape == (2, 4, BATCH)
    reduced = metric.reduced(values)
    assert reduced.shape == ((2, 4, BATCH) if metric.reduction == "none" else (2, 4))
    for at in np.ndindex(2, 4):
        np.testing.assert_allclose(reduced[at], metric(variants[at]), rtol=1e-13)


@EVERY
def test_a_sweep_that_reads_only_what_is_needed_gets_the_same(metric: Metric) -> None:
    needs = metric.needs(BATCH, LENGTH)
    hidden = np.full_like(LOGITS, np.nan)
    rows = np.arange(BATCH)[:, None]
    positions = np.arange(LENGTH) if needs.positions is None else needs.positions
    for prompt, place in np.broadcast(rows, positions):
        columns = slice(None) if needs.tokens is None else needs.tokens[prompt]
        hidden[prompt, place, columns] = LOGITS[prompt, place, columns]
    np.testing.assert_array_equal(metric(hidden), metric(LOGITS))


def test_what_they_need() -> None:
    needs = METRICS["diff"].needs(2, 4)
    assert needs == Needs(np.array([3]), np.array([[2, 7], [2, 7]]))
    needs = METRICS["diff per prompt"].needs(BATCH, LENGTH)
    assert needs == Needs(np.array([[1], [4], [3]]), np.array([[2, 4], [9, 1], [0, 10]]))
    assert METRICS["probability"].needs(2, LENGTH) == Needs(np.array([0]), None)
    assert METRICS["loss"].needs(BATCH, LENGTH) == Needs(np.arange(LENGTH - 1), None)
    assert METRICS["KL everywhere"].needs(BATCH, LENGTH) == Needs()
    assert Needs() != Needs(np.array([0]))


# Each against something else


@few
@given(st.integers(1, 4), st.integers(2, 6), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_the_loss_is_lm_cross_entropy_loss(batch: int, length: int, vocab: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, tokens = rng.normal(0, 4, (batch, length, vocab)), rng.integers(0, vocab, (batch, length))
    metric = CrossEntropy(tokens, position=None)
    np.testing.assert_allclose(metric(logits), lm_cross_entropy_loss(logits, tokens), atol=1e-12)
    per_token = lm_cross_entropy_loss(logits, tokens, per_token=True)
    np.testing.assert_allclose(replace(metric, reduction="none")(logits), per_token.mean(1), atol=1e-12)
    last = CrossEntropy(tokens[:, -1], position=-2, reduction="none")
    np.testing.assert_allclose(last(logits), per_token[:, -1], atol=1e-12)


@few
@given(st.integers(1, 4), st.integers(1, 6), st.integers(2, 9), st.integers(0, 2**32 - 1), st.floats(-50, 50))
def test_laws(batch: int, length: int, vocab: int, seed: int, shift: float) -> None:
    rng = np.random.default_rng(seed)
    logits, other = rng.normal(0, 4, (2, batch, length, vocab))
    position = int(rng.integers(-length, length))
    total = sum(Probability(token, position)(logits) for token in range(vocab))
    assert total == pytest.approx(1)
    odds = math.log(Probability(0, position)(logits[:1]) / Probability(1, position)(logits[:1]))
    assert LogitDiff(0, 1, position)(logits[:1]) == pytest.approx(odds, abs=1e-9)
    assert LogitDiff(0, 1, position)(logits) == -LogitDiff(1, 0, position)(logits)
    assert CrossEntropy(1, position)(logits[:1]) == pytest.approx(-math.log(Probability(1, position)(logits[:1])))
    divergence = KLDivergence(other, position=None)
    assert divergence(logits) > 0
    assert divergence(other) == 0
    assert divergence(logits + shift) == pytest.approx(divergence(logits), abs=1e-9)
    each = [KLDivergence(other, at)(logits) for at in range(length)]
    assert divergence(logits) == pytest.approx(np.mean(each))


def test_logits_of_a_model(tiny: graphlens.HookedTransformer, tokens: Any) -> None:
    logits = tiny(tokens)
    loss = tiny(tokens, return_type="loss")
    assert float(CrossEntropy(tokens, position=None)(logits)) == pytest.approx(float(loss), rel=1e-5)
    metric = LogitDiff(" John", [tiny.to_single_token(" Mary"), 5]).bound(tiny.to_single_token)
    expected = logits[:, -1, tiny.to_single_token(" John")] - logits[[0, 1], -1, [tiny.to_single_token(" Mary"), 5]]
    assert metric(logits) == pytest.approx(expected.mean(dtype=np.float64), rel=1e-6)


# Numbers


def test_float64_from_whatever_is_given() -> None:
    exact = np.round(LOGITS * 4) / 4  # what every dtype below holds
    for metric in METRICS.values():
        for dtype in (np.float16, np.float32, ml_dtypes.bfloat16):
            value = metric(exact.astype(dtype))
            assert value.dtype == np.float64
            np.testing.assert_array_equal(value, metric(exact))
    half = KLDivergence(np.round(OTHER * 4).astype(ml_dtypes.bfloat16) / 4)
    assert half(exact) == KLDivergence(np.round(OTHER * 4) / 4)(exact)


def test_extreme_logits() -> None:
    logits = np.zeros((1, 1, 3))
    logits[0, 0] = [1000, 0, -np.inf]
    assert Probability(0)(logits) == 1
    assert Probability(2)(logits) == 0
    assert CrossEntropy(1)(logits) == 1000
    assert CrossEntropy(2)(logits) == np.inf
    assert LogitDiff(0, 1)(logits) == 1000
    assert KLDivergence(np.zeros((1, 3)))(logits) == np.inf
    assert KLDivergence(np.array([[0.0, 0.0, -2000.0]]))(logits) == pytest.approx(500 - math.log(2))
    far_apart = np.array([[[5000.0, 4999.0]], [[-5000.0, -5001.0]]])  # one prompt's scale is not another's
    np.testing.assert_allclose(Probability(1, reduction="none")(far_apart), 1 / (1 + math.e), rtol=1e-12)
    logits[0, 0, 0] = np.nan
    for metric in (Probability(1), CrossEntropy(1), LogitDiff(0, 1), KLDivergence(np.zeros((1, 3)))):
        assert np.isnan(metric(logits))
    logits[0, 0, 0] = np.inf
    assert np.isnan(Probability(1)(logits))


def test_nothing_given_is_changed_or_kept() -> None:
    reference, ids, logits = OTHER.copy(), np.array(IDS), LOGITS.copy()
    divergence, diff = KLDivergence(reference), LogitDiff(ids, 1)
    before = divergence(logits), diff(logits)
    reference[:], ids[:] = 0, 0
    assert (divergence(logits), diff(logits)) == before
    np.testing.assert_array_equal(logits, LOGITS)
    assert logits.flags.writeable
    assert reference.flags.writeable
    for kept in (divergence.reference, diff.correct):
        with pytest.raises(ValueError, match="read-only"):
            kept[0] = 1


class Tensor:
    """What graphlens asks of a torch tensor."""

    def __init__(self, array: Any) -> None:
        self.array, self.dtype = np.asarray(array), f"torch.{np.asarray(array).dtype}"

    def detach(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return self

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.array(self.array, dtype, copy=copy)

    def new_tensor(self, array: Any) -> Tensor:
        return Tensor(np.asarray(array).astype(self.array.dtype))


@EVERY
def test_tensors_for_tensors(metric: Metric) -> None:
    found = metric(Tensor(LOGITS.astype(np.float32)))
    assert isinstance(found, Tensor)
    assert found.dtype == "torch.float32"
    np.testing.assert_allclose(found.array, metric(LOGITS), rtol=1e-5)


def test_operands_may_be_tensors() -> None:
    assert LogitDiff(Tensor(np.array(IDS)), Tensor(np.array(4)), Tensor(np.array(PLACES))) == LogitDiff(IDS, 4, PLACES)
    assert KLDivergence(Tensor(OTHER)) == KLDivergence(OTHER)


# Text


def test_text_is_bound_to_ids() -> None:
    given_text = LogitDiff([" a", " b", " café"], "Ġ", position=PLACES, reduction="none")
    bound = given_text.bound(NAMES.__getitem__)
    assert bound == LogitDiff([2, 9, 0], 4, position=PLACES, reduction="none")
    assert bound.bound(None) is bound
    assert given_text.correct == (" a", " b", " café")
    assert Probability(" a").bound(NAMES.__getitem__) == Probability(2)
    assert CrossEntropy(("Ġ", " b")).bound(NAMES.__getitem__) == CrossEntropy([4, 9])
    assert METRICS["KL"].bound(None) is METRICS["KL"]
    assert Probability(" a").normalised(1, 0).bound(NAMES.__getitem__) == Probability(2).normalised(1, 0)


def test_text_without_a_tokenizer_or_unbound_is_refused() -> None:
    for metric in (LogitDiff(" a", 1), Probability([" a", " b"]), CrossEntropy(" a"), normalised(Probability(" a"))):
        with pytest.raises(InputError, match=r"' a'.*no tokenizer"):
            metric.bound(None)
    for call in (lambda m: m.check(9), lambda m: m(LOGITS), lambda m: m.needs(3, 5)):
        with pytest.raises(InputError, match=r"metric\.bound"):
            call(LogitDiff(1, " a"))
    with pytest.raises(InputError, match=r"metric\.bound"):
        Probability(" a")(LOGITS)


# Normalised


@pytest.mark.parametrize("name", ["diff", "loss", "KL", "cross-entropy"])
def test_normalised_is_0_at_the_corrupted_and_1_at_the_clean_baseline(name: str) -> None:
    metric = METRICS[name]
    clean, corrupted = metric(LOGITS), metric(LOGITS[::-1] * 0.5)
    scaled = normalised(metric, clean, corrupted)
    assert scaled(LOGITS) == pytest.approx(1)
    assert scaled(LOGITS[::-1] * 0.5) == pytest.approx(0)
    between = metric(LOGITS * 0.7)
    assert scaled(LOGITS * 0.7) == pytest.approx((between - corrupted) / (clean - corrupted))
    assert scaled == metric.normalised(clean, corrupted)
    assert scaled == normalised(metric).filled(clean, corrupted)
    assert scaled.name == f"normalised {metric.name}"
    assert scaled.plain is metric
    assert metric.plain is metric
    assert metric.filled(1, 2) is metric
    assert (scaled.position, scaled.reduction) == (metric.position, metric.reduction)
    assert scaled.needs(BATCH, LENGTH) == metric.needs(BATCH, LENGTH)


def test_normalised_after_the_reduction() -> None:
    clean, corrupted = np.array([2.0, 3.0, -1.0]), np.array([0.0, 4.0, 1.0])
    each = normalised(METRICS["diff per prompt"], clean, corrupted)
    values = RNG.normal(size=(4, 2, BATCH))
    expected = np.empty_like(values)
    for at in np.ndindex(4, 2, BATCH):
        expected[at] = (values[at] - corrupted[at[-1]]) / (clean[at[-1]] - corrupted[at[-1]])
    np.testing.assert_allclose(each.reduced(values), expected, rtol=1e-14)
    whole = normalised(METRICS["diff"], 5, 1)
    np.testing.assert_allclose(whole.reduced(values), (values.sum(-1) / BATCH - 1) / 4, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(whole.of(np.ones((BATCH, 1, 2))), np.zeros(BATCH))
    mixed = normalised(METRICS["diff per prompt"], clean, -2)
    np.testing.assert_allclose(mixed.reduced(clean), np.ones(BATCH))


def test_only_what_is_left_out_is_filled() -> None:
    metric = METRICS["diff"]
    assert normalised(metric, clean=3).filled(9, 1) == normalised(metric, 3, 1)
    assert normalised(metric, corrupted=1).filled(3, 9) == normalised(metric, 3, 1)
    assert normalised(metric, 3, 1).filled(8, 9) == normalised(metric, 3, 1)


@pytest.mark.parametrize("metric", [normalised(METRICS["diff"]), normalised(METRICS["diff"], clean=1)])
def test_normalised_lacks_a_baseline(metric: Metric) -> None:
    with pytest.raises(InputError, match="lacks a baseline"):
        metric(LOGITS)
    with pytest.raises(InputError, match="lacks a baseline"):
        metric.reduced(np.ones(BATCH))


# As data


def test_equality_hash_repr_and_copies() -> None:
    metric = LogitDiff(IDS, 1, position=-2)
    assert metric == LogitDiff(np.array(IDS, np.int32), 1, position=-2)
    assert hash(metric) == hash(LogitDiff(tuple(IDS), 1, -2))
    for other in (LogitDiff(IDS, 2, -2), LogitDiff(IDS, 1), LogitDiff(2, 1, -2), LogitDiff(IDS, 1, -2, "none"), None):
        assert metric != other
    assert Probability(3) != CrossEntropy(3)
    assert normalised(Probability(3), 1, 0) != normalised(CrossEntropy(3), 1, 0)
    assert repr(normalised(LogitDiff([1, 2], 0)).as_key()) != repr(normalised(LogitDiff([1, 3], 0)).as_key())
    assert KLDivergence(OTHER) != KLDivergence(OTHER + 1)
    assert len({*METRICS.values(), *METRICS.values()}) == len(METRICS)
    assert repr(metric) == "LogitDiff(correct=int64[3], incorrect=1, position=-2)"
    assert repr(KLDivergence(OTHER, None, "none")) == (
        "KLDivergence(reference=float64[3, 5, 11], position=None, reduction='none')"
    )
    assert repr(normalised(Probability(" a"), 1)) == "Normalised(metric=Probability(token=' a'), clean=1.0)"
    for known in (*METRICS.values(), normalised(metric, 2, 1)):
        known(LOGITS)  # what it has kept for the next call is no part of it
        assert pickle.loads(pickle.dumps(known)) == known == copy.deepcopy(known)
    with pytest.raises(FrozenInstanceError):
        metric.position = 0  # type: ignore[misc]


def test_names_and_the_public_face() -> None:
    names = {metric.name for metric in METRICS.values()}
    assert names == {"logit difference", "probability", "cross-entropy", "KL divergence"}
    assert sorted(metrics.__all__) == metrics.__all__
    for name in metrics.__all__:
        assert hasattr(metrics, name)


# What is refused


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LogitDiff(-1, 2), "LogitDiff.correct must be ids from 0"),
        (lambda: LogitDiff(1, 2.0), "LogitDiff.incorrect must be a token id.*float64"),
        (lambda: LogitDiff(True, 2), "not bool"),
        (lambda: LogitDiff([1, " a"], 2), "LogitDiff.correct"),
        (lambda: LogitDiff([], 2), "LogitDiff.correct"),
        (lambda: LogitDiff([[1, 2], [3]], 2), "cannot be read"),
        (lambda: LogitDiff([[1, 2]], 2), r"int64\[1, 2\]"),
        (lambda: LogitDiff(None, 2), "object"),
        (lambda: LogitDiff(1, 2, position=None), "LogitDiff.position must be an int"),
        (lambda: Probability(1, position=1.0), "Probability.position"),
        (lambda: Probability(1, position=[[1]]), r"int64\[1, 1\]"),
        (lambda: Probability(1, position=True), "bool"),
        (lambda: Probability(1, reduction="sum"), "Probability.reduction must be 'mean' or 'none', not 'sum'"),
        (lambda: CrossEntropy(1, position=None), r"token ids \[b, p\]"),
        (lambda: CrossEntropy(" a", position=None), r"token ids \[b, p\]"),
        (lambda: CrossEntropy([" a", " b"], position=None), r"token ids \[b, p\]"),
        (lambda: CrossEntropy([[1], [2]], position=None), "2 or more"),
        (lambda: CrossEntropy(TOKENS), r"int64\[3, 5\]"),
        (lambda: KLDivergence(OTHER[0, 0]), r"\[b, p, V\] or \[b, V\]"),
        (lambda: KLDivergence(OTHER[0], position=None), r"\[b, p, V\], not float64\[5, 11\]"),
        (lambda: KLDivergence(TOKENS), "floating point"),
        (lambda: KLDivergence("reference"), "KLDivergence.reference"),
        (lambda: KLDivergence(np.full((2, 3), np.nan)), "NaN or infinities"),
        (lambda: KLDivergence(np.array([[0.0, np.inf]])), "NaN or infinities"),
        (lambda: KLDivergence(np.empty((0, 3))), "KLDivergence.reference"),
        (lambda: normalised("diff"), "'diff'"),
        (lambda: normalised(normalised(LogitDiff(1, 2))), "not so yet"),
        (lambda: normalised(LogitDiff(1, 2), clean=[1, 2]), "Normalised.clean"),
        (lambda: normalised(LogitDiff(1, 2), 1, np.nan), "Normalised.corrupted holds NaN"),
        (lambda: normalised(LogitDiff(1, 2), "1"), "Normalised.clean"),
        (lambda: normalised(LogitDiff(1, 2), 1.5, 1.5), "logit difference is the same.*cannot be normalised"),
        (lambda: normalised(LogitDiff(1, 2)).filled(2, 2), "cannot be normalised"),
        (lambda: normalised(METRICS["diff per prompt"], [1, 2, 3], [0, 2, 0]), "cannot be normalised"),
        (lambda: normalised(METRICS["diff per prompt"], [1, 2, 3], 3), "cannot be normalised"),
        (lambda: normalised(METRICS["diff per prompt"], [1, 2, 3], [4, 5]), "3 prompts, the corrupted of 2"),
    ],
)
def test_a_metric_that_cannot_be(make: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()


@pytest.mark.parametrize(
    ("metric", "batch", "length", "said"),
    [
        (LogitDiff(1, 2, position=5), 3, 5, "LogitDiff.position is 5: prompts of 5 tokens have positions 0 to 4"),
        (Probability(1, position=-6), 3, 5, "is -6"),
        (Probability(1, position=[0, 4, -6]), 3, 5, "is -6"),
        (Probability(1, position=[0, 4]), 3, 5, "Probability.position is of 2 prompts; there are 3"),
        (LogitDiff(IDS, 1), 2, 5, "LogitDiff.correct is of 3 prompts; there are 2"),
        (LogitDiff(1, [5]), 2, 5, "LogitDiff.incorrect is of 1 prompts; there are 2"),
        (CrossEntropy([" a", " b"]), 3, 5, "CrossEntropy.target is of 2 prompts; there are 3"),
        (CrossEntropy(TOKENS, None), 2, 5, "is of 3 prompts; there are 2"),
        (CrossEntropy(TOKENS, None), 3, 6, "5 tokens a prompt; the logits, 6"),
        (KLDivergence(OTHER), 3, 4, "5 positions; there are 4"),
        (KLDivergence(OTHER, None), 3, 6, "5 positions; there are 6"),
        (KLDivergence(OTHER), 1, 5, "is of 3 prompts; there are 1"),
        (KLDivergence(OTHER[:, 0], position=9), 3, 5, "KLDivergence.position is 9"),
        (Normalised(METRICS["diff per prompt"], [1, 2, 3]), 2, 5, "Normalised.clean is of 3 prompts; there are 2"),
    ],
    ids=str,
)
def test_a_metric_that_does_not_fit_the_prompts(metric: Metric, batch: int, length: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        metric.needs(batch, length)
    with pytest.raises(InputError, match=said):
        metric(np.zeros((batch, length, VOCAB)))


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (LogitDiff(1, 11), "LogitDiff.incorrect is 11: token ids go from 0 to 10"),
        (LogitDiff([1, 50, 3], 1), "LogitDiff.correct is 50"),
        (Probability(11), "Probability.token is 11"),
        (CrossEntropy([0, 0, 12]), "CrossEntropy.target is 12"),
        (CrossEntropy(TOKENS + VOCAB - TOKENS.max(), None), "CrossEntropy.target is 11"),
        (KLDivergence(OTHER[..., :9]), "9 tokens; there are 11"),
        (normalised(Probability(11), 1, 0), "Probability.token is 11"),
    ],
    ids=str,
)
def test_ids_outside_the_vocabulary(metric: Metric, said: str) -> None:
    with pytest.raises(InputError, match=said):
        metric.check(VOCAB)
    with pytest.raises(InputError, match=said):
        metric(LOGITS)


@pytest.mark.parametrize(
    ("logits", "said"),
    [
        (LOGITS[0], r"\[batch, position, vocabulary\], not float64\[5, 11\]"),
        (LOGITS[None], r"\[1, 3, 5, 11\]"),
        (TOKENS[..., None], "int64"),
        (LOGITS[:0], "floating point"),
        (LOGITS.astype(complex), "complex128"),
        ("logits", "logits must be"),
        ([[[1.0, 2.0], [1.0]]], "cannot be read"),
    ],
)
def test_logits_that_are_none(logits: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        LogitDiff(0, 1)(logits)


def test_parts_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="needs the logits of 2 tokens; these have 11"):
        METRICS["diff"].of(LOGITS[:, :1])
    with pytest.raises(InputError, match="at 1 positions; these have 5"):
        METRICS["probability"].of(LOGITS)
    with pytest.raises(InputError, match="at 4 positions; these have 5"):
        METRICS["loss"].of(LOGITS)
    with pytest.raises(InputError, match="at 5 positions; these have 1"):
        METRICS["KL everywhere"].of(LOGITS[:, :1])
    with pytest.raises(InputError, match="is of 3 prompts; there are 2"):
        METRICS["diff per prompt"].of(np.zeros((BATCH, 2, 1, 2)))
    with pytest.raises(InputError, match=r"float64\[3, 2\]"):
        METRICS["diff"].of(np.zeros((BATCH, 2)))
    with pytest.raises(InputError, match=r"Probability\.token is 10"):
        METRICS["probability"].of(LOGITS[:, :1, :4])


def test_the_base_measures_nothing_by_itself() -> None:
    class Largest(Metric):
        label = "largest logit"
        position, reduction = -1, "mean"

        def _values(self, scores: Any) -> Any:
            return scores[..., 0, :].max(-1)

    assert Largest()(LOGITS) == pytest.approx(LOGITS[:, -1].max(-1).mean())
    assert Largest().name == "largest logit"
    assert Largest().needs(2, 7) == Needs(np.array([6]))
