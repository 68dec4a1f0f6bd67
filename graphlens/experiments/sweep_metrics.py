"""The metrics of a sweep: with token ids in place of text, with their baselines, and their values of whole logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from graphlens.analysis.arrays import Array, as_array
from graphlens.analysis.metric import Metric
from graphlens.analysis.sources import Source
from graphlens.errors import InputError

if TYPE_CHECKING:
    from graphlens.model.request import Request
    from graphlens.model.runner import Runner

# One of graphlens.metrics, or a function of logits [b, p, V], the user's kind of array, to one number.
Measure = Metric | Callable[[Any], Any]


class Measuring:
    """The metrics of one sweep.

    Args:
        runner: Runs the model.
        request: The corrupted run.
        metrics: What is measured.
        logits: The corrupted run's, [b, p, V].
        source: Where patched values come from; a cache that holds the clean run's logits gives the clean values.

    Attributes:
        metrics: The metrics, with token ids in place of text, and the baselines that a normalised one lacked.
        corrupted: Their values of the corrupted run.
        clean: Their values of the clean run; None where the source does not give them.

    Raises:
        InputError: For a metric that does not fit the prompts or the model, or is NaN.
    """

    def __init__(
        self,
        runner: Runner[Any],
        request: Request,
        metrics: Sequence[Measure],
        logits: Array,
        source: Source,
    ) -> None:
        self._runner, self._shape = runner, request.shape
        self._d_vocab = runner.config.d_vocab_out
        self.metrics: list[Measure] = []
        self.corrupted: list[Array] = []
        self.clean: list[Array | None] = []
        clean_logits = self._clean_logits(source)
        for metric in metrics:
            plain: Measure = metric
            if isinstance(metric, Metric):
                metric = runner.bound(metric, request.mask)
                metric.check(self._d_vocab)
                metric.needs(*request.shape)
                plain = metric.plain
            here = self.of(plain, logits)
            there = None if clean_logits is None else self.of(plain, clean_logits)
            if isinstance(metric, Metric):
                metric = metric.filled(there, here)
                here = self.of(metric, logits)
                there = None if clean_logits is None else self.of(metric, clean_logits)
            self.metrics.append(metric)
            self.corrupted.append(here)
            self.clean.append(there)

    def _clean_logits(self, source: Source) -> Array | None:
        """The clean run's logits, where the source is the cache of one that has them."""
        activations = getattr(source, "activations", {})
        if "unembed.hook_out" not in activations:
            return None
        found = np.asarray(activations["unembed.hook_out"])
        found = found[None] if found.ndim == 2 else found
        return found if found.shape == (*self._shape, self._d_vocab) else None

    def of(self, metric: Measure, logits: Array) -> Array:
        """The value of a metric.

        Args:
            metric: One of this sweep's.
            logits: [b, p, V].

        Returns:
            A scalar, or [b] for a metric that keeps one value for each prompt.

        Raises:
            InputError: If it is NaN, or a function of one's own gave something else than one number.
        """
        if isinstance(metric, Metric):
            value = np.asarray(metric(logits))
        else:
            value = one_number(metric(self._runner.border.to_user(logits)))
        if np.isnan(value).any():
            raise InputError(f"the metric {called(metric)} is NaN. Does it divide by zero, or take a log of one?")
        return value

    def read(self) -> Array | None:
        """The positions int64 [b, m] that the metrics read; None where one needs all logits, or all positions."""
        found: list[Array] = []
        for metric in self.metrics:
            positions = metric.needs(*self._shape).positions if isinstance(metric, Metric) else None
            if positions is None:
                return None
            found.append(np.broadcast_to(positions, (self._shape[0], positions.shape[-1])))
        return np.concatenate(found, 1)


def one_number(given: Any) -> Array:
    """What a metric returned, as an array without axes.

    Args:
        given: A number, or an array or tensor that holds one.

    Raises:
        InputError: For anything else.
    """
    value = as_array(given)
    if value.size != 1 or value.dtype.kind not in "biuf":
        raise InputError(
            f"the metric returned {type(given).__name__} of shape {list(value.shape)}; it must return one number "
            "(average over the batch), or be one of graphlens.metrics with reduction='none'."
        )
    return value.reshape(())


def called(metric: Measure) -> str:
    """How an error names a metric.

    Args:
        metric: A metric or function.
    """
    return repr(metric.name if isinstance(metric, Metric) else getattr(metric, "__name__", type(metric).__name__))
