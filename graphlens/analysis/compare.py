"""Estimates of patches from gradients, how far they can be trusted, and what components write to the logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens.analysis.result import SweepResult
from graphlens.errors import InputError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Comparison:
    """How an estimate stands to the exact sweep. Effects are values less the corrupted baseline.

    ``correlation``: Pearson's, of the effects (NaN where either is constant). ``slope``: of the least-squares line through
    0, estimate over exact. ``worst``: (labels, estimated effect, exact effect) of the sites furthest apart.
    """

    correlation: float
    slope: float
    largest_error: float
    worst: tuple[tuple[Mapping[str, str], float, float], ...]

    def __str__(self) -> str:
        lines = [f"correlation {self.correlation:.3f}, slope {self.slope:.3f}, largest error {self.largest_error:.3g}"]
        for labels, estimated, exact in self.worst:
            where = ", ".join(f"{axis} {label}" for axis, label in labels.items())
            lines.append(f"  {where}: estimated {estimated:+.3g}, exact {exact:+.3g}")
        return "\n".join(lines)


def compare_with_sweep(estimate: SweepResult, exact: SweepResult, n: int = 10) -> Comparison:
    """How far attribution patching is from the patches themselves, over the same sites and metric.

    Raises InputError for results of other axes or labels.
    """
    if estimate.axes != exact.axes or estimate.labels != exact.labels:
        raise InputError("the estimate and the sweep are not over the same sites: their axes or labels differ.")
    found, true = (result.values - result.against("corrupted") for result in (estimate, exact))
    a, b = found.ravel(), true.ravel()
    if np.isnan(a).any() or np.isnan(b).any():
        raise InputError("a result holds values that are not computed yet: finish the sweep first.")
    constant = a.std() == 0 or b.std() == 0
    correlation = float("nan") if constant else float(np.corrcoef(a, b)[0, 1])
    norm = float(b @ b)
    errors = np.abs(a - b)
    worst = []
    for flat in np.argsort(-errors, kind="stable")[:n]:
        index = np.unravel_index(int(flat), found.shape)
        labels = {axis: exact.labels[axis][int(i)] for axis, i in zip(exact.axes, index, strict=True)}
        worst.append((labels, float(a[flat]), float(b[flat])))
    return Comparison(correlation, float(a @ b) / norm if norm else float("nan"), float(errors.max()), tuple(worst))


def circuit(scores: SweepResult, n: int) -> list[str]:
    """The ``n`` edges of the largest scores, by absolute value. Raises InputError unless 0 <= n <= their number."""
    if scores.axes != ("edge",):
        raise InputError(f"a circuit is taken from edge_attribution's result, not from one over {scores.axes}.")
    if not 0 <= n <= scores.shape[0]:
        raise InputError(f"n={n}: there are {scores.shape[0]} edges.")
    order = np.argsort(-np.abs(scores.values), kind="stable")[:n]
    return [scores.labels["edge"][int(i)] for i in order]
