"""The pieces that a block is cut into, so that a run may enter it at any of them with a batch of its own making.

Per block: residual -> q, k, v; q, k, v -> z; z -> residual between; that -> residual after. All but attention work token
by token, so they take tokens of any sequences and positions together, as rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from graphlens.engine.engine import Engine

Array = npt.NDArray[Any]


@dataclass
class Proof:
    """What the first use of a model's pieces found out.

    Attributes:
        why: Why they are not to be trusted; "" where they are; None where nobody has looked.
        unembedding: "W_U" where the logits are unembed.hook_in times W_U plus b_U.
    """

    why: str | None = None
    unembedding: str = ""


class BlockPieces:
    """A model in pieces. ``max_rows``: how many tokens a piece is given at once."""

    def __init__(self, engine: Engine, max_rows: int) -> None:
        self._engine = engine
        self._max_rows = max_rows

    def _rows(self, inputs: Sequence[str], outputs: Sequence[str], arrays: Sequence[Array]) -> list[Array]:
        """Runs a piece that works token by token on arrays [tokens, ...]."""
        session = self._engine.part(inputs, outputs)
        pieces = []
        for start in range(0, len(arrays[0]), self._max_rows):
            feeds = {
                name: array[None, start : start + self._max_rows]
                for name, array in zip(inputs, arrays, strict=True)
                if name in session.inputs
            }
            pieces.append([result[0] for result in session.run(session.outputs, feeds)])
        return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in zip(*pieces, strict=True)]

    def qkv(self, layer: int, residual: Array) -> list[Array]:
        """q, k, v [tokens, heads, d_head] from the residual before a block [tokens, d_model]."""
        at = f"blocks.{layer}."
        outputs = [f"{at}attn.hook_{letter}" for letter in "qkv"]
        return self._rows([f"{at}hook_resid_pre"], outputs, [residual])

    def z(self, layer: int, q: Array, k: Array, v: Array, mask: Array) -> Array:
        """z [rows, queries, heads, d_head] from q [rows, queries, ...], k and v [rows, keys, ...] and bool ``mask``
        [rows or 1, 1, queries, keys], True where a query may look."""
        at = f"blocks.{layer}.attn.hook_"
        return self._attend([f"{at}q", f"{at}k", f"{at}v", "mask"], layer, [q, k, v, mask])

    def z_from(self, hook: str, layer: int, weights: Array, v: Array) -> Array:
        """z from attention scores or a pattern [rows, heads, queries, keys] at ``hook``, and v [rows, keys, ...]."""
        return self._attend([hook, f"blocks.{layer}.attn.hook_v"], layer, [weights, v])

    def _attend(self, inputs: list[str], layer: int, arrays: list[Array]) -> Array:
        session = self._engine.part(inputs, [f"blocks.{layer}.attn.hook_z"])
        # Every row holds a whole sequence of keys and values, however few queries it has.
        some = max(1, 2 * self._max_rows // max(array.shape[1] for array in arrays[1:3]))
        parts = []
        for start in range(0, len(arrays[0]), some):
            here = [array[start : start + some] if len(array) > 1 else array for array in arrays]
            parts.append(session.run(session.outputs, dict(zip(inputs, here, strict=True)))[0])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def resid_mid(self, layer: int, z: Array, residual: Array) -> Array:
        """The residual between attention and MLP, from z and the residual before the block (all [tokens, ...])."""
        at = f"blocks.{layer}."
        return self._rows([f"{at}attn.hook_z", f"{at}hook_resid_pre"], [f"{at}hook_resid_mid"], [z, residual])[0]

    def resid_post(self, layer: int, between: Array) -> Array:
        """The residual after a block from the one between attention and MLP [tokens, d_model]."""
        at = f"blocks.{layer}."
        return self._rows([f"{at}hook_resid_mid"], [f"{at}hook_resid_post"], [between])[0]

    def resid_post_from(self, hook: str, layer: int, neurons: Array, between: Array) -> Array:
        """The residual after a block from the MLP's activations [tokens, d_mlp] at ``hook``, before or after the
        activation function, and the residual between."""
        at = f"blocks.{layer}."
        return self._rows([hook, f"{at}hook_resid_mid"], [f"{at}hook_resid_post"], [neurons, between])[0]

    def end(self, residual: Array, output: str) -> Array:
        """``unembed.hook_in`` or ``logits`` from the last residual [tokens, d_model]."""
        last = self._engine.manifest.config.n_layers - 1
        return self._rows([f"blocks.{last}.hook_resid_post"], [output], [residual])[0]
