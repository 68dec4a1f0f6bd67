"""What a sweep over many prompts found: the mean effect at each place, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from graphlens.analysis import statistics
from graphlens.analysis.arrays import Array
from graphlens.analysis.result import SweepResult
from graphlens.errors import InputError, checked_number

if TYPE_CHECKING:
    from rich.table import Table

FIGURES = ("mean", "standard_error", "low", "high", "p_value")
MAX_ROWS = 20  # of the table that a console shows


@dataclass(frozen=True, eq=False)
class EffectSummary:
    """The effects at every place of a sweep over many prompts: how far a patch moves the metric from the corrupted run.

    Attributes:
        mean: The mean effect, a SweepResult with the axes of the places ("layer", "pos", ...).
        standard_error: Of the mean; NaN of a single prompt.
        low: The lower end of the bootstrap interval of the mean.
        high: Its upper end.
        p_value: Of "the mean effect is 0", by flipping signs: of one place at a time, not corrected for how many there are.
        prompts: The number of prompts.
        confidence: What share of the bootstrap's means lies between ``low`` and ``high``.
        resamples: How many means and patterns of signs were drawn.
        examples: The values of each prompt, a SweepResult with a last axis "batch"; None where they were not kept.
    """

    mean: SweepResult
    standard_error: SweepResult
    low: SweepResult
    high: SweepResult
    p_value: SweepResult
    prompts: int
    confidence: float
    resamples: int
    examples: SweepResult | None = None

    def top(self, n: int = 10) -> list[tuple[dict[str, str], dict[str, float]]]:
        """The places with the largest mean effects, largest first.

        Args:
            n: How many, 1 or more.

        Returns:
            ({axis: label}, {"mean", "standard_error", "low", "high", "p_value"}) of each.

        Raises:
            InputError: Unless n >= 1.
        """
        n = checked_number(n, "n", least=1)
        found = []
        for at in np.argsort(-np.abs(self.mean.values), axis=None, kind="stable")[:n]:
            index = np.unravel_index(int(at), self.mean.shape)
            labels = {axis: self.mean.labels[axis][int(i)] for axis, i in zip(self.mean.axes, index, strict=True)}
            found.append((labels, {name: float(getattr(self, name).values[index]) for name in FIGURES}))
        return found

    def __rich__(self) -> Table:
        """A table of the places with the largest effects."""
        from graphlens.views.tables import effects_table

        title = f"Mean effect over {self.prompts} prompts, {self.confidence:.0%} bootstrap interval"
        return effects_table(title, self.mean.axes, self.top(MAX_ROWS))

    def __repr__(self) -> str:
        sizes = ", ".join(f"{axis}={size}" for axis, size in zip(self.mean.axes, self.mean.shape, strict=True))
        return f"EffectSummary({sizes}; {self.prompts} prompts)"


def summarise(
    result: SweepResult, confidence: float = 0.95, resamples: int = 2000, seed: int = 0, per_example: bool = True
) -> EffectSummary:
    """The mean effects of a sweep with a value for each prompt, and how sure they are.

    Args:
        result: A sweep's, with the axis "batch": of a metric with reduction="none".
        confidence: Of the bootstrap interval, between 0 and 1.
        resamples: How many means are drawn for it, and how many patterns of signs for the p-values.
        seed: Of the draws.
        per_example: False leaves out the values of each prompt.

    Returns:
        The summary. An effect is a value less the corrupted run's of the same prompt.

    Raises:
        InputError: For a result without the axis "batch" or with places that are not done, and for numbers out of range.
    """
    confidence = checked_number(confidence, "confidence", float, least=0, most=1)
    resamples, seed = checked_number(resamples, "resamples", least=1), checked_number(seed, "seed", least=0)
    if "batch" not in result.axes:
        raise InputError(
            f"a summary is over prompts, and this result has no axis 'batch' ({', '.join(result.axes)}): measure it with "
            "reduction='none'."
        )
    if np.isnan(result.values).any():
        raise InputError("some places of this sweep are not done yet: resume it first.")
    if result.baselines["corrupted"] is None:
        raise InputError("this result does not know the corrupted run's values, from which effects are measured.")
    effects = result.values - result.against("corrupted")

    def over_places(values: Array) -> SweepResult:
        labels = {axis: names for axis, names in result.labels.items() if axis != "batch"}
        return replace(result, values=values, axes=result.axes[:-1], labels=labels, baselines={})

    low, high = statistics.bootstrap_interval(effects, confidence, resamples, seed)
    return EffectSummary(
        over_places(effects.mean(-1)),
        over_places(statistics.standard_error(effects)),
        over_places(low),
        over_places(high),
        over_places(statistics.sign_flip_p(effects, resamples, seed)),
        effects.shape[-1],
        confidence,
        resamples,
        result if per_example else None,
    )
