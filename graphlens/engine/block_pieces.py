"""The pieces that a block is cut into, so that a run may enter it at any of them with a batch of its own making.

A piece goes from some hook points of a block to others: from resid_pre to q, k and v; from those to z; from z and
resid_pre to resid_mid; from resid_mid to resid_post. Only attention looks at more than one token. All other pieces work
token by token, so they take tokens of any sequences and positions together, as rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from graphlens.file.io_names import MASK
from graphlens.file.names import in_block
from graphlens.runtime.types import Array

if TYPE_CHECKING:
    from graphlens.engine.engine import Engine

RESID_PRE, RESID_MID, RESID_POST = "hook_resid_pre", "hook_resid_mid", "hook_resid_post"
Z, QKV = "attn.hook_z", ("attn.hook_q", "attn.hook_k", "attn.hook_v")


@dataclass
class Proof:
    """What is known of a model's pieces: whether they, run one after the other, compute what the model computes.

    Attributes:
        why: Why the pieces must not be used, "" if they may be, and None if nobody has tried yet.
        unembedding: "W_U" if the logits are ``unembed.hook_in`` times W_U plus b_U, so that single logits can be had
            without the others, else "".
    """

    why: str | None = None
    unembedding: str = ""


class BlockPieces:
    """A model in pieces, each opened on first use. Layers count from 0; arrays have the model's dtype.

    Args:
        engine: The model.
        max_rows: How many tokens a piece is given at once, at most.
    """

    def __init__(self, engine: Engine, max_rows: int) -> None:
        self._engine = engine
        self._max_rows = max_rows

    def qkv(self, layer: int, resid_pre: Array) -> list[Array]:
        """hook_q, hook_k and hook_v, each [tokens, heads, d_head], from hook_resid_pre [tokens, d_model]."""
        outputs = [in_block(layer, name) for name in QKV]
        return self._rowwise([in_block(layer, RESID_PRE)], outputs, [resid_pre])

    def z(self, layer: int, q: Array, k: Array, v: Array, mask: Array) -> Array:
        """hook_z from hook_q, hook_k and hook_v.

        Args:
            layer: The block.
            q: [rows, queries, heads, d_head].
            k: [rows, keys, heads, d_head].
            v: [rows, keys, heads, d_head].
            mask: bool [rows or 1, 1, queries, keys], True where a query may look.

        Returns:
            [rows, queries, heads, d_head].
        """
        return self._attend([*(in_block(layer, name) for name in QKV), MASK], layer, [q, k, v, mask])

    def z_from(self, hook: str, layer: int, weights: Array, v: Array) -> Array:
        """hook_z [rows, queries, heads, d_head] from hook_attn_scores or hook_pattern, and hook_v.

        Args:
            hook: The full name of the one that is given.
            layer: The block.
            weights: Its values [rows, heads, queries, keys].
            v: [rows, keys, heads, d_head].
        """
        return self._attend([hook, in_block(layer, QKV[2])], layer, [weights, v])

    def resid_mid(self, layer: int, z: Array, resid_pre: Array) -> Array:
        """hook_resid_mid [tokens, d_model] from hook_z [tokens, heads, d_head] and hook_resid_pre [tokens, d_model]."""
        return self._to_residual([in_block(layer, Z), in_block(layer, RESID_PRE)], layer, RESID_MID, [z, resid_pre])

    def resid_post(self, layer: int, resid_mid: Array) -> Array:
        """hook_resid_post [tokens, d_model] from hook_resid_mid [tokens, d_model]."""
        return self._to_residual([in_block(layer, RESID_MID)], layer, RESID_POST, [resid_mid])

    def resid_post_from(self, hook: str, layer: int, neurons: Array, resid_mid: Array) -> Array:
        """hook_resid_post [tokens, d_model] from mlp.hook_pre or mlp.hook_post, and hook_resid_mid.

        Args:
            hook: The full name of the one that is given.
            layer: The block.
            neurons: Its values [tokens, d_mlp].
            resid_mid: [tokens, d_model].
        """
        return self._to_residual([hook, in_block(layer, RESID_MID)], layer, RESID_POST, [neurons, resid_mid])

    def end(self, resid_post: Array, output: str) -> Array:
        """``unembed.hook_in`` [tokens, d_model] or ``logits`` [tokens, d_vocab] from the last block's hook_resid_post.

        Args:
            resid_post: [tokens, d_model].
            output: Which of the two.
        """
        last = self._engine.manifest.config.n_layers - 1
        return self._rowwise([in_block(last, RESID_POST)], [output], [resid_post])[0]

    def _to_residual(self, inputs: Sequence[str], layer: int, output: str, arrays: Sequence[Array]) -> Array:
        """Runs a piece that works token by token and ends in a residual of the block."""
        return self._rowwise(inputs, [in_block(layer, output)], arrays)[0]

    def _rowwise(self, inputs: Sequence[str], outputs: Sequence[str], arrays: Sequence[Array]) -> list[Array]:
        """Runs a piece that works token by token on arrays [tokens, ...]."""
        session = self._engine.part(inputs, outputs)
        parts = []
        for start in range(0, len(arrays[0]), self._max_rows):
            feeds = {
                name: array[None, start : start + self._max_rows]
                for name, array in zip(inputs, arrays, strict=True)
                if name in session.inputs
            }
            parts.append([result[0] for result in session.run(session.outputs, feeds)])
        return [_joined(column) for column in zip(*parts, strict=True)]

    def _attend(self, inputs: Sequence[str], layer: int, arrays: Sequence[Array]) -> Array:
        """Runs a piece that ends in hook_z on arrays [rows, ...]; an array of one row belongs to every row."""
        session = self._engine.part(inputs, [in_block(layer, Z)])
        # Every row holds a whole sequence of keys and values, however few queries it has.
        some = max(1, 2 * self._max_rows // max(array.shape[1] for array in arrays[1:3]))
        parts = []
        for start in range(0, len(arrays[0]), some):
            here = [array[start : start + some] if len(array) > 1 else array for array in arrays]
            parts.append(session.run(session.outputs, dict(zip(inputs, here, strict=True)))[0])
        return _joined(parts)


def _joined(parts: Sequence[Array]) -> Array:
    """Arrays one after the other along their first axis; a sole one is not copied."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
