"""Scores of the features and errors of several SAEs, and the circuits of those whose scores are high enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphlens.analysis.arrays import Array
from graphlens.analysis.result import SweepResult
from graphlens.errors import InputError, checked_number

ERROR = "error"


@dataclass(frozen=True, eq=False)
class FeatureCircuit:
    """Some of the features and errors of several SAEs: a sparse feature circuit.

    Attributes:
        features: The hook point where each SAE stands -> which of its features are in it: bool [p or 1, d_sae].
        errors: The same of its errors: bool [p or 1].
        numbers: What the features of each are called.
        by_position: True if a node is a feature at one position; False if it is one at all.
    """

    features: Mapping[str, Array]
    errors: Mapping[str, Array]
    numbers: Mapping[str, Sequence[int]]
    by_position: bool

    def __len__(self) -> int:
        return sum(int(mask.sum()) for each in (self.features, self.errors) for mask in each.values())

    def __repr__(self) -> str:
        return f"FeatureCircuit({len(self)} nodes of {len(self.features)} SAEs)"

    def without(self) -> FeatureCircuit:
        """The circuit of all other nodes."""
        turned = [{hook: ~mask for hook, mask in each.items()} for each in (self.features, self.errors)]
        return FeatureCircuit(turned[0], turned[1], self.numbers, self.by_position)

    @property
    def nodes(self) -> list[str]:
        """Its nodes by label, as ``FeatureScores.nodes`` has them."""
        found = []
        for hook, mask in self.features.items():
            found += [_label(hook, str(self.numbers[hook][f]), p, self.by_position) for p, f in np.argwhere(mask)]
            found += [_label(hook, ERROR, int(p), self.by_position) for p in np.flatnonzero(self.errors[hook])]
        return found


@dataclass(frozen=True, eq=False)
class FeatureScores:
    """What each feature and each error of several SAEs adds to a metric.

    Attributes:
        features: The hook point where each SAE stands -> the scores of its features: float64 [p or 1, d_sae].
        errors: The same of its errors: float64 [p or 1].
        numbers: What the features of each are called.
        by_position: True if a node is a feature at one position; False if it is one at all, and its score the sum.
        total: The metric of the run.
        model: The model's name.
        metric: The metric's name.
    """

    features: Mapping[str, Array]
    errors: Mapping[str, Array]
    numbers: Mapping[str, Sequence[int]]
    by_position: bool
    total: float
    model: str = ""
    metric: str = ""

    def __repr__(self) -> str:
        count = sum(array.size for each in (self.features, self.errors) for array in each.values())
        return (
            f"FeatureScores({count:,} nodes of {len(self.features)} SAEs, {self.metric or 'metric'} {self.total:.4g})"
        )

    def top(self, n: int = 20) -> SweepResult:
        """The nodes whose scores are largest in size, largest first.

        Args:
            n: How many, 1 or more.

        Returns:
            An axis "node", labelled "blocks.2.hook_resid_post/17 at 3", or "…/error at 3".

        Raises:
            InputError: Unless n >= 1.
        """
        n = checked_number(n, "n", least=1)
        found: list[tuple[float, str]] = []
        for hook, scores in self.features.items():
            places = np.argsort(-np.abs(scores), axis=None, kind="stable")[:n]
            for at in places:
                p, f = (int(i) for i in np.unravel_index(at, scores.shape))
                found.append((float(scores[p, f]), _label(hook, str(self.numbers[hook][f]), p, self.by_position)))
            errors = self.errors[hook]
            found += [(float(errors[p]), _label(hook, ERROR, p, self.by_position)) for p in range(len(errors))]
        found = sorted(found, key=lambda pair: -abs(pair[0]))[:n]
        values, labels = [value for value, _ in found], [label for _, label in found]
        metadata = {"model": self.model, "metrics": [self.metric], "total": self.total}
        return SweepResult(np.asarray(values), ("node",), {"node": labels}, {"corrupted": 0.0}, metadata)

    def circuit(self, threshold: float | None = None, *, n: int | None = None, errors: bool = True) -> FeatureCircuit:
        """The nodes whose scores are large enough in size (Marks et al. 2024).

        Args:
            threshold: What the size of a score must exceed.
            n: How many nodes instead: those of the largest scores, errors counted.
            errors: False keeps every error, whatever its score, and counts none.

        Returns:
            The circuit. A node with score 0 is in none.

        Raises:
            InputError: Unless either ``threshold`` or ``n`` is given.
        """
        if (threshold is None) == (n is None):
            raise InputError("a circuit is of the nodes above threshold=, or of the n= strongest: give one of the two.")
        sizes = {hook: np.abs(scores) for hook, scores in self.features.items()}
        wrong = {hook: np.abs(scores) for hook, scores in self.errors.items()}
        if n is not None:
            n = checked_number(n, "n", least=0)
            counted = [*sizes.values(), *(wrong.values() if errors else ())]
            every = np.sort(np.concatenate([each.ravel() for each in counted]))[::-1]
            limit = max(float(every[n]) if n < len(every) else 0.0, 0.0)
        else:
            limit = checked_number(threshold, "threshold", float, least=0.0)
        kept = {hook: each > limit for hook, each in wrong.items()}
        if not errors:
            kept = {hook: np.ones_like(mask) for hook, mask in kept.items()}
        return FeatureCircuit(
            {hook: each > limit for hook, each in sizes.items()}, kept, self.numbers, self.by_position
        )


def _label(hook: str, what: str, position: int, by_position: bool) -> str:
    return f"{hook}/{what} at {position}" if by_position else f"{hook}/{what}"
