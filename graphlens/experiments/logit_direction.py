"""What a logit difference reads of the last residual stream, through the final norm with the scale of one run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, cast

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT
from graphlens.analysis.metrics import LogitDiff
from graphlens.errors import InputError

if TYPE_CHECKING:
    from graphlens.model.request import Request
    from graphlens.model.runner import Runner


def ensure_direct(metric: object) -> LogitDiff:
    """A metric, once it is known to be one that components write to directly.

    Args:
        metric: What a user gave.

    Raises:
        InputError: It is no LogitDiff with a mean over the prompts.
    """
    if not isinstance(metric, LogitDiff) or metric.reduction != "mean":
        raise InputError(f"direct logit attribution is of a LogitDiff with a mean, not of {type(metric).__name__}.")
    return metric


@dataclass(frozen=True)
class LogitDirection:
    """A logit difference as a linear function of the residual stream: ``(residual * direction).sum(-1) + constant``.

    Attributes:
        metric: The logit difference, with token ids in place of text.
        direction: float64 [b, d_model]: the difference of two columns of W_U, times the final norm's weight, divided by its
            scale in the run, and centred where the norm centres.
        constant: float64 [b]: what the biases of the norm and of the unembedding add.
        positions: int64 [b], where the logits are read.
    """

    metric: LogitDiff
    direction: Array
    constant: Array
    positions: Array

    @classmethod
    def of(cls, runner: Runner[ArrayT], metric: LogitDiff, request: Request, scale: Array) -> Self:
        """What a logit difference reads in a run.

        Args:
            runner: Runs the model.
            metric: The logit difference.
            request: The run.
            scale: Its ``ln_final.hook_scale``, [b, p, 1].

        Raises:
            InputError: The metric does not fit the run.
        """
        metric = runner.bound(metric, request.mask)
        metric.check(runner.config.d_vocab_out)
        needs = metric.needs(*request.shape)
        tokens, batch = cast(Array, needs.tokens), request.shape[0]  # a logit difference reads two tokens at one place
        positions = np.broadcast_to(cast(Array, needs.positions), (batch, 1))[:, 0]
        # Their columns alone: W_U of a large vocabulary takes a while to convert.
        columns = np.take(np.asarray(runner.weights["unembed.W_U"]), tokens, axis=1).astype(np.float64)  # [D, b, 2]
        plain = (columns[..., 0] - columns[..., 1]).T
        weight, bias = runner.weights.stored.get("ln_final.w"), runner.weights.stored.get("ln_final.b")
        direction = plain if weight is None else plain * np.asarray(weight, np.float64)
        if runner.config.norm_centres("ln_final"):
            direction = direction - direction.mean(-1, keepdims=True)
        b_u = np.asarray(runner.weights["unembed.b_U"], np.float64)[tokens]
        constant = b_u[:, 0] - b_u[:, 1] + (0 if bias is None else (plain * np.asarray(bias, np.float64)).sum(-1))
        return cls(
            metric, direction / np.asarray(scale)[np.arange(batch), positions].astype(np.float64), constant, positions
        )
