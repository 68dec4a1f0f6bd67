"""Logits of single tokens, without those of all others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT

if TYPE_CHECKING:
    from graphlens.model.runner import Runner


class Columns:
    """The columns of W_U and the entries of b_U of some tokens, taken once for any number of runs.

    Args:
        runner: Has the weights.
        tokens: int64 [b, k].
        dtype: Of the residual streams that they will be multiplied with.
    """

    def __init__(self, runner: Runner[ArrayT], tokens: Array, dtype: np.dtype[np.generic]) -> None:
        # Rows of the transpose: taken as columns, the whole matrix would be copied first.
        self._taken = runner.weights["unembed.W_U"].T[tokens].astype(dtype).transpose(0, 2, 1)  # [b, D, k]
        self._bias = runner.weights["unembed.b_U"][tokens].astype(dtype)[:, None]
        self._scale, self._cap = runner.config.output_logits_scale, runner.config.output_logits_soft_cap

    def logits(self, hidden: Array) -> Array:
        """Logits of the tokens alone: the product with their columns of W_U, plus b_U, then as the config says.

        Args:
            hidden: unembed.hook_in, [variant, b, m, d_model].

        Returns:
            [variant, b, m, k].
        """
        found: Array = np.matmul(hidden, self._taken) + self._bias
        found = found if self._scale == 1 else found * np.asarray(self._scale, found.dtype)
        return found if self._cap <= 0 else np.tanh(found / self._cap) * self._cap
