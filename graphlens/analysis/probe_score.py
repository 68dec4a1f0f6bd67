"""How well numbers tell True from False: accuracy and the area under the ROC curve, and how sure both are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Doubles: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ProbeScore:
    """How well a probe tells some tokens.

    Both intervals count what hangs together as one: tokens of a document, or documents of a group, are no independent evidence.

    Attributes:
        accuracy: The share of tokens it is right about.
        accuracy_interval: (low, high), Wilson's interval (1927).
        auc: The area under the ROC curve: how often a token labelled True gets a larger number than one labelled False, where
            ties count half.
        auc_interval: (low, high), by the variance of Hanley and McNeil (1982), solved for the area as Wilson's is for a share.
        majority: The accuracy of always answering what is more frequent.
        tokens: How many tokens it was asked about.
        documents: How many documents they are of.
        confidence: Of the intervals.
    """

    accuracy: float
    accuracy_interval: tuple[float, float]
    auc: float
    auc_interval: tuple[float, float]
    majority: float
    tokens: int
    documents: int
    confidence: float


def score(
    values: Doubles,
    labels: npt.NDArray[np.bool_],
    documents: npt.NDArray[np.int64],
    units: npt.NDArray[np.int64],
    confidence: float,
) -> ProbeScore:
    """The score of a probe's numbers.

    Args:
        values: float64 [n], more than 0 where it says True.
        labels: bool [n], both kinds among them.
        documents: int64 [n], the document of each token.
        units: int64 [n], what hangs together.
        confidence: Of the intervals, between 0 and 1.
    """
    right = (values > 0) == labels
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    found = area(values, labels)
    sizes = independent(units[labels]), independent(units[~labels])
    share = float(labels.mean())
    return ProbeScore(
        float(right.mean()),
        interval(float(right.mean()), lambda p: p * (1 - p) / independent(units), z),
        found,
        interval(found, lambda a: area_variance(a, *sizes), z),
        max(share, 1 - share),
        len(values),
        len(np.unique(documents)),
        confidence,
    )


def independent(units: npt.NDArray[np.int64]) -> float:
    """How many independent observations tokens are worth that depend wholly on one another inside a unit (Kish 1965).

    Args:
        units: int64 [n], the unit of each token.

    Returns:
        The number of units where they are equally large, fewer otherwise.
    """
    counts = np.unique(units, return_counts=True)[1].astype(np.float64)
    return float(counts.sum() ** 2 / (counts**2).sum())


def area(values: Doubles, labels: npt.NDArray[np.bool_]) -> float:
    """The area under the ROC curve, by ranks (Mann and Whitney 1947).

    Args:
        values: float64 [n].
        labels: bool [n], both kinds among them.
    """
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # equal ones share their middle rank
    true, false = int(labels.sum()), int((~labels).sum())
    return float((ranks[labels].sum() - true * (true + 1) / 2) / (true * false))


def area_variance(a: float, true: float, false: float) -> float:
    """The variance of an area under the ROC curve (Hanley and McNeil 1982, in Newcombe's form of 2006).

    Args:
        a: The area.
        true: How many independent observations are True.
        false: How many are False.
    """
    others = (true + false) / 2 - 1
    return a * (1 - a) * (1 + others * ((1 - a) / (2 - a) + a / (1 + a))) / (true * false)


def interval(found: float, variance: Callable[[float], float], z: float) -> tuple[float, float]:
    """All values between 0 and 1 that a found one does not speak against: within z of its own standard deviations of it.

    Unlike found +- z deviations, it has a width where the found one is 0 or 1.

    Args:
        found: What was found.
        variance: The variance of what is found, where the true value is this.
        z: How many standard deviations.

    Returns:
        (low, high).
    """

    def end(outer: float) -> float:
        inner = found
        for _ in range(60):
            middle = (inner + outer) / 2
            if (middle - found) ** 2 <= z**2 * variance(middle):
                inner = middle
            else:
                outer = middle
        return inner

    return end(0.0), end(1.0)
