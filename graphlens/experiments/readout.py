"""The metrics of patched runs from their last residual streams; only the logits that a metric reads are computed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from graphlens.analysis.arrays import Array
from graphlens.analysis.metric import Metric
from graphlens.analysis.metric_inputs import Needs
from graphlens.engine.block_pieces import BlockPieces
from graphlens.errors import InputError
from graphlens.experiments.columns import Columns
from graphlens.experiments.corrupted_run import CorruptedRun
from graphlens.experiments.sweep_metrics import called
from graphlens.file.io_names import LOGITS
from graphlens.file.names import UNEMBEDDED, in_block


class Readout:
    """Computes the metrics of a sweep from last residual streams.

    Args:
        run: The corrupted run, which has the metrics.
        pieces: The model in pieces.
        by_columns: True if the logits of some tokens may be computed from their columns of W_U alone.
    """

    def __init__(self, run: CorruptedRun, pieces: BlockPieces, by_columns: bool) -> None:
        self._run, self._pieces, self._by_columns = run, pieces, by_columns
        self._columns: dict[int, Columns] = {}  # by metric

    def values(self, indices: Sequence[int], start: int, residual: Array) -> list[Array]:
        """Each metric's values, [variant] or [variant, b].

        Args:
            indices: The sites of the variants, for an error.
            start: The variants' first position.
            residual: Last residual streams [variant, b, m, d_model]: at the positions that the metrics read, metric
                after metric, or from ``start`` on where one reads all.

        Raises:
            InputError: For a metric that is NaN.
        """
        run, read = self._run, self._read
        if run.logits is not None:
            return self._of_whole_logits(run.logits, start, residual)
        offset, found = 0, []
        for number, (metric, needs) in enumerate(self._needs):
            if read is None:  # all positions of one metric: those before the first are the corrupted run's
                here = self._with_earlier(residual, start)
                here = here if needs.positions is None else here[:, np.arange(run.batch)[:, None], needs.positions]
            else:
                assert needs.positions is not None
                count = needs.positions.shape[-1]
                here, offset = residual[:, :, offset : offset + count], offset + count
            if needs.tokens is None or not self._by_columns:
                values = self._in_slices(metric, here)
            else:
                hidden = self._end(here, UNEMBEDDED)
                if number not in self._columns:
                    self._columns[number] = Columns(run.runner, needs.tokens, hidden.dtype)
                values = metric.of(self._columns[number].logits(hidden))
            values = metric.reduced(values)
            if np.isnan(values).any():
                raise InputError(
                    f"the metric {called(metric)} is NaN at {run.sites[indices[int(np.isnan(values).argmax())]]}."
                )
            found.append(values)
        return found

    @cached_property
    def _read(self) -> Array | None:
        return self._run.measuring.read()

    @cached_property
    def _needs(self) -> list[tuple[Metric, Needs]]:
        """The metrics, where each is a function of some positions, and what it reads."""
        run = self._run
        return [(one, one.needs(run.batch, run.length)) for one in run.measuring.metrics if isinstance(one, Metric)]

    def _end(self, residual: Array, output: str) -> Array:
        found = self._pieces.end(residual.reshape(-1, residual.shape[-1]), output)
        return found.reshape(*residual.shape[:-1], -1)

    def _in_slices(self, metric: Metric, residual: Array) -> Array:
        """A metric's values [variant, b] through whole logits, no more of them at once than a run of the prompt has."""
        run = self._run
        some = max(1, run.length // residual.shape[2])
        needs = metric.needs(run.batch, run.length)
        parts = []
        for start in range(0, len(residual), some):
            logits = self._end(residual[start : start + some], LOGITS)
            if needs.tokens is not None:
                logits = np.take_along_axis(logits, needs.tokens[None, :, None], -1)
            parts.append(metric.of(logits))
        return np.concatenate(parts)

    def _with_earlier(self, residual: Array, start: int) -> Array:
        """Last residual streams of every position, those before ``start`` the corrupted run's."""
        last = self._run.activations[in_block(self._run.n_layers - 1, "hook_resid_post")][None, :, :start]
        return np.concatenate([np.broadcast_to(last, (len(residual), *last.shape[1:])), residual], 2)

    def _of_whole_logits(self, corrupted: Array, start: int, residual: Array) -> list[Array]:
        """Values of metrics of which one is a function of whole logits: those before ``start`` are the corrupted run's."""
        rows = []
        for variant in residual:
            logits = np.array(corrupted)
            logits[:, start:] = self._end(variant, LOGITS)
            rows.append([self._run.measuring.of(metric, logits) for metric in self._run.measuring.metrics])
        return [np.stack(column) for column in zip(*rows, strict=True)]
