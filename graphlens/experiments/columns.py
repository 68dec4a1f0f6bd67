"""Logits of single tokens, without those of all others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT

if TYPE_CHECKING:
    from graphlens.model.runner import Runner


def columns(runner: Runner[ArrayT], hidden: Array, tokens: Array) -> Array:
    """Logits of some tokens alone: the product with their columns of W_U, plus b_U, then as the config says.

    Args:
        runner: Has the weights.
        hidden: unembed.hook_in, [variant, b, m, d_model].
        tokens: int64 [b, k].

    Returns:
        [variant, b, m, k].
    """
    # Rows of the transpose: taken as columns, the whole matrix would be copied first.
    taken = runner.weights["unembed.W_U"].T[tokens].astype(hidden.dtype)  # [b, k, D]
    bias = runner.weights["unembed.b_U"][tokens].astype(hidden.dtype)
    found: Array = np.matmul(hidden, taken.transpose(0, 2, 1)) + bias[:, None]
    scale, cap = runner.config.output_logits_scale, runner.config.output_logits_soft_cap
    found = found if scale == 1 else found * np.asarray(scale, found.dtype)
    return found if cap <= 0 else np.tanh(found / cap) * cap
