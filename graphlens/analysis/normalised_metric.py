"""The normalised metric: another one's values as shares of the way from the corrupted prompts to the clean ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self, cast

import numpy as np

from graphlens.analysis.arrays import Array, ArrayInput
from graphlens.analysis.metric import Baseline, Metric, Positions, ToToken
from graphlens.analysis.metric_inputs import Needs, checked, kept
from graphlens.errors import InputError


@dataclass(frozen=True, eq=False, repr=False)
class Normalised(Metric):
    """(metric - corrupted) / (clean - corrupted) of a metric's reduced values; made by ``normalised``.

    ``of`` still gives the plain values: ``reduced`` normalises.

    Attributes:
        metric: The metric that is normalised.
        clean: Its value on the clean prompts without a patch, where it is known.
        corrupted: Its value on the corrupted prompts without a patch, where it is known.
    """

    metric: Metric
    clean: Baseline = None
    corrupted: Baseline = None

    @property
    def position(self) -> Positions | None:
        """Where the metric reads the logits."""
        return self.metric.position

    @property
    def reduction(self) -> str:
        """The metric's own reduction."""
        return self.metric.reduction

    def __post_init__(self) -> None:
        if not isinstance(self.metric, Metric) or isinstance(self.metric, Normalised):
            raise InputError(f"what is normalised is a metric that is not so yet, not {self.metric!r}.")
        given = [field for field in ("clean", "corrupted") if getattr(self, field) is not None]
        axes = (0, 1) if self.metric.reduction == "none" else (0,)
        for field in given:
            wanted = "a number (or numbers [b], where the metric's reduction is 'none')"
            baseline = checked(getattr(self, field), self._called(field), "fiu", axes, wanted)
            if not np.isfinite(baseline).all():
                raise InputError(f"{self._called(field)} holds NaN or infinities: nothing can be normalised by it.")
            self._set(field, kept(baseline, np.float64))
        if len(given) == 2 and not np.all(np.not_equal(*self._pair())):
            raise InputError(
                f"the {self.metric.name} is the same on a clean and its corrupted prompt: patching cannot be normalised "
                f"by a difference of 0 ({self.clean} and {self.corrupted}). Measure it as it is, or take other prompts."
            )

    def _pair(self) -> tuple[Array, Array]:
        """Both baselines as arrays. Raises InputError where they are of different numbers of prompts."""
        clean, corrupted = np.asarray(self.clean), np.asarray(self.corrupted)
        if clean.ndim and corrupted.ndim and clean.shape != corrupted.shape:
            raise InputError(f"the clean baseline is of {len(clean)} prompts, the corrupted of {len(corrupted)}.")
        return clean, corrupted

    def _baselines(self, hint: str = "") -> tuple[float | Array, float | Array]:
        """(corrupted, clean - corrupted). Raises InputError where one is missing."""
        if self.clean is None or self.corrupted is None:
            raise InputError(f"{self!r} lacks a baseline: pass clean and corrupted{hint}.")
        clean, corrupted = cast("tuple[float | Array, float | Array]", (self.clean, self.corrupted))
        return corrupted, clean - corrupted

    @property
    def name(self) -> str:
        """What to call it in a table or a plot."""
        return f"normalised {self.metric.name}"

    @property
    def plain(self) -> Metric:
        """The metric without its normalisation: what its baselines are measured with."""
        return self.metric

    def filled(self, clean: Baseline, corrupted: Baseline) -> Normalised:
        """The same with these baselines in place of those left out. Raises InputError as the constructor does."""
        found = (clean if self.clean is None else self.clean, corrupted if self.corrupted is None else self.corrupted)
        return Normalised(self.metric, *found)

    def bound(self, to_single_token: ToToken | None) -> Self:
        """The metric with token ids in place of text. Raises InputError where there is text and no tokenizer."""
        return replace(self, metric=self.metric.bound(to_single_token))

    def masked(self, mask: ArrayInput | None) -> Self:
        """The same of prompts with padding; see ``metric.masked``."""
        return replace(self, metric=self.metric.masked(mask))

    def needs(self, batch: int, length: int) -> Needs:
        """What ``metric`` needs. Raises InputError also for baselines of another number of prompts."""
        self._check_batch(batch)
        return self.metric.needs(batch, length)

    def check(self, d_vocab: int) -> None:
        """Raises InputError for token ids that a vocabulary of ``d_vocab`` does not have."""
        self.metric.check(d_vocab)

    def of(self, logits: ArrayInput) -> Array:
        """The values [..., b] of ``metric``, not normalised: ``reduced`` does that."""
        return self.metric.of(logits)

    @property
    def linear(self) -> bool:
        """True if the metric's derivative is the same whatever the logits."""
        return self.metric.linear

    def slopes(self, logits: ArrayInput) -> Array:
        """The derivative of the normalised value, or of each prompt's. Raises InputError without both baselines."""
        _, difference = self._baselines()
        each = np.asarray(difference)
        found: Array = self.metric.slopes(logits) / (each[:, None, None] if each.ndim else each)
        return found

    def reduced(self, values: Array) -> Array:
        """Values [..., b] reduced as ``metric`` does, then normalised. Raises InputError without both baselines."""
        corrupted, difference = self._baselines(", or let a sweep measure them")
        found: Array = (self.metric.reduced(values) - corrupted) / difference
        return found


def normalised(metric: Metric, clean: Baseline = None, corrupted: Baseline = None) -> Normalised:
    """(metric - corrupted) / (clean - corrupted): 0 where a patch changes nothing, 1 where it restores everything.

    Args:
        metric: What to normalise.
        clean: Its value on the clean prompts without a patch: a number, or numbers [b] for reduction "none". A sweep
            measures it where it is left out.
        corrupted: Its value on the corrupted prompts without a patch, likewise.

    Returns:
        The metric in those shares; a Metric like others.

    Raises:
        InputError: Where the two are equal, not finite, or of another shape.
    """
    return Normalised(metric, clean, corrupted)
