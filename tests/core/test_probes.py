"""Probes on plain arrays: their weights are the optimum, their figures those that are defined, their intervals cover."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from graphlens.analysis.probe_fit import fit
from graphlens.analysis.probe_score import area, area_variance, independent, interval, score
from graphlens.errors import InputError

Z = 1.959963984540054  # of 95 %


def data(seed: int = 0, count: int = 151, width: int = 7) -> tuple[Any, Any]:
    """Activations of very unlike scales, correlated, and labels that depend on some of them."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((count, width)) @ random.standard_normal((width, width))
    values = values * 10.0 ** np.linspace(-3, 3, width) + 100 * random.standard_normal(width)
    z = (values - values.mean(0)) / values.std(0)
    labels = (z[:, 0] - z[:, -1] + random.standard_normal(count) > 0.3).astype(np.int64)
    return values, labels


def pieces(values: Any, labels: Any, size: int = 40) -> Callable[[], Iterator[tuple[Any, Any]]]:
    def read() -> Iterator[tuple[Any, Any]]:
        for first in range(0, len(values), size):
            yield values[first : first + size], labels[first : first + size]

    return read


def objective(kind: str, z: Any, y: Any, weights: Any, bias: Any, l2: float) -> float:
    """As docs say it, written anew."""
    total = 0.0
    for row, sign in zip(z, y, strict=True):
        number = float(sum(row * weights)) + bias
        total += math.log1p(math.exp(-sign * number)) if kind == "logistic" else (number - sign) ** 2 / 2
    return total / len(z) + l2 / 2 * float(sum(weights**2))


@pytest.mark.parametrize("kind", ["logistic", "ridge"])
@pytest.mark.parametrize("l2", [1e-3, 0.2])
def test_nothing_near_the_weights_is_better(kind: str, l2: float) -> None:
    values, labels = data()
    weights, bias = fit(pieces(values, labels), values.shape[1], kind, l2)
    mean, deviation = values.mean(0), values.std(0)
    z, y = (values - mean) / deviation, 2 * labels - 1
    scaled, at = weights * deviation, bias + weights @ mean
    best = objective(kind, z, y, scaled, at, l2)
    for number in range(len(scaled) + 1):  # the objective is convex: no slope means no better place anywhere
        step = np.zeros(len(scaled) + 1)
        step[number] = 1e-4
        ends = [objective(kind, z, y, scaled + side * step[:-1], at + side * step[-1], l2) for side in (1, -1)]
        assert min(ends) > best
        assert abs(ends[0] - ends[1]) / 2e-4 < 1e-7


def test_ridge_is_the_least_squares_solution() -> None:
    values, labels = data(1)
    count, width = values.shape
    l2 = 0.03
    mean, deviation = values.mean(0), values.std(0)
    z = (values - mean) / deviation
    # Rows that pull every weight to 0, and do not touch the bias.
    held = np.concatenate([np.eye(width) * math.sqrt(l2 * count), np.zeros((width, 1))], 1)
    rows = np.concatenate([np.concatenate([z, np.ones((count, 1))], 1), held])
    wanted = np.linalg.lstsq(rows, np.concatenate([2.0 * labels - 1, np.zeros(width)]), rcond=None)[0]
    weights, bias = fit(pieces(values, labels), width, "ridge", l2)
    np.testing.assert_allclose(weights * deviation, wanted[:-1], rtol=1e-7, atol=1e-10)
    assert bias == pytest.approx(wanted[-1] - weights @ mean, rel=1e-9)


@pytest.mark.parametrize("kind", ["logistic", "ridge"])
def test_the_pieces_do_not_matter(kind: str) -> None:
    values, labels = data(2)
    one, other = (fit(pieces(values, labels, size), values.shape[1], kind, 0.01) for size in (13, 10**6))
    np.testing.assert_allclose(one[0], other[0], rtol=1e-6)
    assert one[1] == pytest.approx(other[1], rel=1e-6)


def test_scikit_learn_finds_the_same() -> None:
    """Where it is installed: no extra has it."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    values, labels = data(3)
    mean, deviation, count = values.mean(0), values.std(0), len(values)
    z, l2 = (values - mean) / deviation, 0.02
    logistic = linear_model.LogisticRegression(C=1 / (l2 * count), tol=1e-12, max_iter=10_000).fit(z, labels)
    ridge = linear_model.Ridge(alpha=l2 * count).fit(z, 2 * labels - 1)
    for kind, theirs in (("logistic", logistic.coef_[0]), ("ridge", ridge.coef_)):
        weights, _ = fit(pieces(values, labels), values.shape[1], kind, l2)
        np.testing.assert_allclose(weights * deviation, theirs, rtol=1e-4, atol=1e-6)
    metrics = pytest.importorskip("sklearn.metrics")
    numbers = np.round(z[:, 0], 1)  # with ties
    assert area(numbers, labels > 0) == pytest.approx(metrics.roc_auc_score(labels, numbers), abs=1e-12)


def test_a_plane_between_the_kinds_and_numbers_that_never_change() -> None:
    values, _ = data(4)
    values[:, 3] = 7.25
    labels = (values[:, 0] > np.median(values[:, 0])).astype(np.int64)
    weights, bias = fit(pieces(values, labels), values.shape[1], "logistic", 1e-6)
    assert np.isfinite(weights).all()
    assert weights[3] == 0
    assert np.array_equal(values @ weights + bias > 0, labels > 0)


def test_weights_that_do_not_settle_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphlens.analysis.probe_fit.MOST_PASSES", 2)
    values, labels = data()
    with pytest.raises(InputError, match="Raise l2"):
        fit(pieces(values, labels), values.shape[1], "logistic", 1e-6)


# Figures


def test_the_area_is_the_share_of_pairs_in_order() -> None:
    random = np.random.default_rng(0)
    values = random.integers(0, 9, 60).astype(float)  # many ties
    labels = random.random(60) < 0.3
    pairs = [(a > b) + (a == b) / 2 for a in values[labels] for b in values[~labels]]
    assert area(values, labels) == pytest.approx(np.mean(pairs), abs=1e-12)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # Published: Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_a_share_is_wilsons(right: int, count: int, low: float, high: float) -> None:
    found = interval(right / count, lambda p: p * (1 - p) / count, Z)
    assert found == pytest.approx((low, high), abs=6e-5)


def test_all_right_is_not_certain() -> None:
    values, labels = np.repeat([1.0, -1.0], 10), np.repeat([True, False], 10)
    found = score(values, labels, np.arange(20), np.arange(20), 0.95)
    assert found.accuracy == found.auc == 1
    assert found.accuracy_interval == pytest.approx((1 - 0.1611, 1), abs=6e-5)
    assert 0.7 < found.auc_interval[0] < 0.95
    assert found.auc_interval[1] == 1


def test_both_labels_count_for_the_area() -> None:
    values, labels = np.arange(30.0), np.arange(30) % 5 > 1  # 18 and 12, and of these many in the wrong order
    found = score(values, labels, np.arange(30), np.arange(30), 0.95)
    assert found.auc_interval == pytest.approx(interval(found.auc, lambda a: area_variance(a, 18, 12), Z))
    halves = np.arange(30) // 15  # two units, each with both labels: 2 observations of either
    wide = score(values, labels, halves, halves, 0.95)
    assert wide.auc_interval == pytest.approx(interval(found.auc, lambda a: area_variance(a, 2, 2), Z), abs=0.01)


def test_tokens_of_one_document_are_one_observation() -> None:
    random = np.random.default_rng(5)
    values, labels = random.standard_normal(30), random.random(30) < 0.5
    alone = score(values, labels, np.arange(30), np.arange(30), 0.9)
    again = np.repeat(np.arange(30), 7)
    many = score(values[again], labels[again], again, again, 0.9)
    assert many.tokens == 210
    assert many.documents == 30
    for name in ("accuracy", "auc"):
        assert getattr(many, name) == pytest.approx(getattr(alone, name))
        assert getattr(many, f"{name}_interval") == pytest.approx(getattr(alone, f"{name}_interval"))
    assert independent(np.asarray([0, 0, 0, 1])) == pytest.approx(16 / 10)


def test_the_interval_of_an_area_covers_it() -> None:
    """Of two normal distributions a distance d apart the area is Phi(d / sqrt 2)."""
    random, true, false, apart = np.random.default_rng(6), 25, 40, 1.2
    wanted = 0.5 * (1 + math.erf(apart / 2))
    held = 0
    labels = np.repeat([True, False], [true, false])
    for _ in range(400):
        found = area(random.standard_normal(true + false) + apart * labels, labels)
        low, high = interval(found, lambda a: area_variance(a, true, false), Z)
        held += low <= wanted <= high
    assert 0.92 <= held / 400 <= 0.98
