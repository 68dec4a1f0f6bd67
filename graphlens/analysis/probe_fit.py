"""The weights of a linear probe: the optimum of ridge and logistic regression, by Newton's steps over activations in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from graphlens.errors import InputError

Doubles: TypeAlias = npt.NDArray[np.float64]
# Reads all of the data once: activations float64 [n, width], and int64 [n], 1 for True and 0 for False.
Pieces: TypeAlias = Callable[[], Iterator[tuple[Doubles, npt.NDArray[np.int64]]]]

FITTED = ("logistic", "ridge")
_NEAR = 1e-9  # the largest entry of the gradient of a mean loss at which an optimum is reached
MOST_PASSES = 200  # passes over the data at most; ten are usual


@dataclass(frozen=True)
class _At:
    """The objective at some weights: its value, gradient [width + 1] and second derivatives [width + 1, width + 1]."""

    value: float
    gradient: Doubles
    curvature: Doubles


def fit(pieces: Pieces, width: int, kind: str, l2: float) -> tuple[Doubles, float]:
    """The weights and the bias of a linear probe.

    The objective, with z an activation whose numbers were brought to mean 0 and standard deviation 1:
    mean loss + l2 / 2 * |w|^2, the bias free. The loss is log(1 + exp(-y (w z + b))) or (w z + b - y)^2 / 2, y being 1 or -1.
    It has one optimum, whatever the order of the data. In scikit-learn's terms on n tokens: LogisticRegression(C=1/(l2 n)),
    Ridge(alpha=l2 n).

    Args:
        pieces: See ``Pieces``. Each pass holds one piece and two matrices [width + 1, width + 1].
        width: The numbers of an activation.
        kind: "logistic" or "ridge".
        l2: How strongly large weights are held down.

    Returns:
        float64 [width] and a number: of activations as they are, not as they were scaled.

    Raises:
        InputError: The optimum is not reached.
    """
    mean, deviation = _moments(pieces, width)
    weights = np.zeros(width + 1)
    here = _objective(pieces, mean, deviation, weights, kind, l2)
    for _ in range(MOST_PASSES):
        if np.abs(here.gradient).max() <= _NEAR:
            found: Doubles = weights[:-1] / deviation
            return found, float(weights[-1] - found @ mean)
        step, length = np.linalg.solve(here.curvature, here.gradient), 1.0
        while True:
            there = _objective(pieces, mean, deviation, weights - length * step, kind, l2)
            # Close to the optimum the value no longer tells steps apart.
            if there.value <= here.value + 1e-12 * (1 + abs(here.value)) or length < 1e-6:
                break
            length /= 2
        weights, here = weights - length * step, there
    raise InputError(f"the probe's weights do not settle with l2={l2:g}. Raise l2.")


def _moments(pieces: Pieces, width: int) -> tuple[Doubles, Doubles]:
    """The mean and the standard deviation of each number, the latter 1 where all are equal."""
    count, mean, squares = 0, np.zeros(width), np.zeros(width)
    for values, _ in pieces():
        here = values.mean(0)
        apart, n = here - mean, len(values)
        squares += ((values - here) ** 2).sum(0) + apart**2 * (count * n / (count + n))
        mean, count = mean + apart * (n / (count + n)), count + n
    deviation = np.sqrt(squares / max(count, 1))
    # What rounding alone tells apart says nothing.
    return mean, np.where(deviation > 1e-7 * np.abs(mean), deviation, 1.0)


def _objective(pieces: Pieces, mean: Doubles, deviation: Doubles, weights: Doubles, kind: str, l2: float) -> _At:
    """One pass over the data."""
    size = len(weights)
    value, gradient, curvature, count = 0.0, np.zeros(size), np.zeros((size, size)), 0
    for values, labels in pieces():
        z = np.concatenate([(values - mean) / deviation, np.ones((len(values), 1))], 1)
        found, y = z @ weights, np.where(labels > 0, 1.0, -1.0)
        if kind == "logistic":
            with np.errstate(over="ignore"):  # exp(-large) is 0, and that is what is meant
                unlikely = 1 / (1 + np.exp(y * found))
            value += float(np.logaddexp(0, -y * found).sum())
            slope, bend = -y * unlikely, unlikely * (1 - unlikely)
        else:
            value += float(((found - y) ** 2).sum()) / 2
            slope, bend = found - y, np.ones(len(y))
        gradient += z.T @ slope
        rooted = z * np.sqrt(bend)[:, None]  # a product with itself costs half of another
        curvature += rooted.T @ rooted
        count += len(y)
    held = np.full(size, l2)
    held[-1] = 0
    # A bias that nothing moves any more still needs a step that can be solved for.
    damped = held + np.where(held > 0, 0, 1e-12)
    value = value / count + float(held @ weights**2) / 2
    return _At(value, gradient / count + held * weights, curvature / count + np.diag(damped))
