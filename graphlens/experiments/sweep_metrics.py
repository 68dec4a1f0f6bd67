"""Measuring the metrics of a sweep: bound to the model's tokenizer, their baselines, and their values of whole logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens.analysis.metrics import Metric
from graphlens.analysis.sources import Source
from graphlens.errors import InputError
from graphlens.experiments.sweep import Measure

Array = npt.NDArray[Any]


class Measuring:
    """The metrics of one sweep of prompts of ``shape`` (batch, length), of which ``logits`` are the corrupted run's.

    ``metrics`` have token ids in place of text, and the baselines that a normalised one lacked; ``corrupted`` and
    ``clean`` are their values of both runs (clean ones None where the source is not the cache of a whole run).
    Raises InputError for a metric that does not fit the prompts or the model, or is NaN.
    """

    def __init__(
        self, model: Any, shape: tuple[int, int], metrics: Sequence[Measure], logits: Array, source: Source
    ) -> None:
        self._model, self._shape = model, shape
        self._d_vocab = model.cfg.d_vocab
        self.metrics: list[Measure] = []
        self.corrupted: list[Array] = []
        self.clean: list[Array | None] = []
        clean_logits = self._clean_logits(source)
        tokenizer = model.to_single_token if model.tokenizer is not None else None
        for metric in metrics:
            plain: Measure = metric
            if isinstance(metric, Metric):
                metric = metric.bound(tokenizer)
                metric.check(self._d_vocab)
                metric.needs(*shape)
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
        """A metric of logits [b, p, V]: a scalar, or [b] where it keeps one value for each prompt."""
        if isinstance(metric, Metric):
            value = np.asarray(metric(logits))
        else:
            given = metric(self._model._to_user(logits))
            if hasattr(given, "detach"):
                given = given.detach().cpu().numpy()
            value = np.asarray(given)
            if value.size != 1 or value.dtype.kind not in "biuf":
                raise InputError(
                    f"the metric returned {type(given).__name__} of shape {list(value.shape)}; it must return one number "
                    "(average over the batch), or be one of graphlens.metrics with reduction='none'."
                )
            value = value.reshape(())
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


def called(metric: Measure) -> str:
    """How an error names a metric."""
    return repr(metric.name if isinstance(metric, Metric) else getattr(metric, "__name__", type(metric).__name__))
