"""How far estimates of patches are from the patches themselves, and the circuit of the best edges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from graphlens.analysis.result import SweepResult
from graphlens.errors import InputError, checked_number


@dataclass(frozen=True)
class Comparison:
    """How far an estimate is from the exact sweep. An effect is a value minus the corrupted baseline.

    Attributes:
        correlation: Pearson's, of the effects; NaN where either is constant.
        slope: Of the least-squares line through 0, estimate over exact; NaN where no exact effect differs from 0.
        largest_error: The largest absolute difference of two effects.
        worst: (labels, estimated effect, exact effect) of the sites furthest apart, the furthest first.
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
    """How far attribution patching is from the patches themselves.

    Args:
        estimate: The result of ``attribution_patch``.
        exact: The result of ``sweep`` over the same sites, with the same metric.
        n: How many of the worst sites to list.

    Returns:
        Their correlation, the slope, and the sites that are off most.

    Raises:
        InputError: For results of other axes or labels, and for values that are not computed yet.
    """
    if estimate.axes != exact.axes or estimate.labels != exact.labels:
        raise InputError("the estimate and the sweep are not over the same sites: their axes or labels differ.")
    n = checked_number(n, "n", least=0)
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
    """The edges with the largest scores, by absolute value.

    Args:
        scores: The result of ``edge_attribution``.
        n: How many edges.

    Returns:
        Their labels ("L0H1->L2MLP"), the largest score first.

    Raises:
        InputError: For a result over other axes, and unless 0 <= n <= the number of edges.
    """
    if scores.axes != ("edge",):
        raise InputError(f"a circuit is taken from edge_attribution's result, not from one over {scores.axes}.")
    n = checked_number(n, "n")
    if not 0 <= n <= scores.shape[0]:
        raise InputError(f"n={n}: there are {scores.shape[0]} edges.")
    order = np.argsort(-np.abs(scores.values), kind="stable")[:n]
    return [scores.labels["edge"][int(i)] for i in order]
