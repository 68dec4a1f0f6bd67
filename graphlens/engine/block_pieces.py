"""The pieces that a block is cut into, so that a run may enter it at any of them with a batch of its own making.

A piece goes from some hook points of a block to others: from resid_pre to queries, keys and values; from those to z; from z
and resid_pre to resid_mid, or where attention and MLP are side by side to resid_post; from resid_mid to resid_post. Only
attention looks at more than one token. All other pieces work token by token, so they take tokens of any sequences and
positions together, as rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from graphlens.engine.block_layout import (
    ATTN_OUT,
    MLP_OUT,
    QKV,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
    ROTATED,
    BlockLayout,
    Z,
)
from graphlens.errors import InputError
from graphlens.file.io_names import DISTANCE, LOCAL_MASK, MASK, POSITIONS
from graphlens.file.names import in_block
from graphlens.runtime.types import Array

if TYPE_CHECKING:
    from graphlens.engine.engine import Engine
    from graphlens.runtime.sessions import Runnable

# Why blocks of a foreign graph are not cut: a mask that it makes of the number of tokens would be another one in a piece.
WHOLE_BLOCKS = "its masks and positions are computed inside its blocks, which only run as a whole"
_SEEN = (MASK, LOCAL_MASK, DISTANCE)  # what attention may read besides queries, keys and values


@dataclass
class Proof:
    """What is known of a model's pieces: whether they, run one after the other, compute what the model computes.

    Attributes:
        why: Why the pieces must not be used, "" if they may be, and None if nobody has tried yet.
        unembedding: "W_U" if the logits are ``unembed.hook_in`` times W_U plus b_U, so that single logits can be had
            without the others, else "".
        starts: Block -> whether a run that begins there gives the model's logits; blocks that nobody tried are absent.
    """

    why: str | None = None
    unembedding: str = ""
    starts: dict[int, bool] = field(default_factory=dict)


class BlockPieces:
    """A model in pieces, each opened on first use. Layers count from 0; arrays have the model's dtype.

    Args:
        engine: The model.
        max_rows: How many tokens a piece is given at once, at most.

    Raises:
        InputError: The model was adopted.

    Attributes:
        layout: How its blocks are laid out.
    """

    def __init__(self, engine: Engine, max_rows: int) -> None:
        if engine.manifest.adopted is not None:
            raise InputError(f"{engine.manifest.config.model_name} was adopted: {WHOLE_BLOCKS}.")
        self._engine = engine
        self._max_rows = max_rows
        self._reads: dict[int, set[str]] = {}
        self.layout = BlockLayout.of(engine)

    # To and in attention

    def compared(self, layer: int, resid_pre: Array, positions: Array | None) -> list[Array]:
        """Queries and keys as they are compared, and values, each [tokens, heads, d_head].

        Args:
            layer: The block.
            resid_pre: hook_resid_pre [tokens, d_model].
            positions: int64 [tokens]; None where the block does not rotate queries and keys.
        """
        given = {in_block(layer, RESID_PRE): resid_pre}
        return self._turned(layer, given, self.layout.compared(layer), positions)

    def rotated(self, layer: int, name: str, heads: Array, positions: Array) -> Array:
        """Queries or keys as they are compared [tokens, heads, d_head], from hook_q or hook_k.

        Args:
            layer: The block, whose queries and keys are rotated.
            name: ``attn.hook_q`` or ``attn.hook_k``.
            heads: Its values [tokens, heads, d_head].
            positions: int64 [tokens].
        """
        return self._turned(layer, {in_block(layer, name): heads}, [in_block(layer, ROTATED[name])], positions)[0]

    def qkv(self, layer: int, resid_pre: Array) -> list[Array]:
        """hook_q, hook_k and hook_v, each [tokens, heads, d_head], from hook_resid_pre [tokens, d_model]."""
        outputs = [in_block(layer, name) for name in QKV]
        return self._rowwise({in_block(layer, RESID_PRE): resid_pre}, outputs)

    def reads(self, layer: int) -> set[str]:
        """Which of MASK, LOCAL_MASK and DISTANCE (see file/io_names.py) a block's attention reads.

        Args:
            layer: The block.
        """
        if layer not in self._reads:
            self._reads[layer] = set(_SEEN) & set(self._attention(layer).inputs)
        return self._reads[layer]

    def z(self, layer: int, q: Array, k: Array, v: Array, seen: Mapping[str, Array]) -> Array:
        """hook_z from queries and keys as they are compared, and values.

        Args:
            layer: The block.
            q: [rows, queries, heads, d_head].
            k: [rows, keys, heads, d_head].
            v: [rows, keys, heads, d_head].
            seen: What ``reads`` names: masks bool [rows or 1, 1, queries, keys], True where a query may look, and distances
                [queries, keys].

        Returns:
            [rows, queries, heads, d_head].
        """
        return self._attend(
            self._attention(layer), dict(zip(self.layout.compared(layer), (q, k, v), strict=True)), seen
        )

    def z_from(self, hook: str, layer: int, weights: Array, v: Array) -> Array:
        """hook_z [rows, queries, heads, d_head] from hook_attn_scores or hook_pattern, and hook_v.

        Args:
            hook: The full name of the one that is given.
            layer: The block.
            weights: Its values [rows, heads, queries, keys].
            v: [rows, keys, heads, d_head].
        """
        given = {hook: weights, in_block(layer, QKV[2]): v}
        return self._attend(self._engine.part(list(given), [in_block(layer, Z)]), given, {})

    # From attention to the end of the block

    def attn_out(self, layer: int, z: Array, output: str = ATTN_OUT) -> Array:
        """hook_attn_out [tokens, d_model] from hook_z [tokens, heads, d_head].

        Args:
            layer: The block.
            z: [tokens, heads, d_head].
            output: Another hook point on the way there, without the block.
        """
        return self._to(layer, output, {Z: z})

    def resid_mid(self, layer: int, z: Array, resid_pre: Array) -> Array:
        """hook_resid_mid [tokens, d_model] from hook_z [tokens, heads, d_head] and hook_resid_pre [tokens, d_model]."""
        return self._to(layer, RESID_MID, {Z: z, RESID_PRE: resid_pre})

    def resid_post(self, layer: int, resid_mid: Array) -> Array:
        """hook_resid_post [tokens, d_model] from hook_resid_mid [tokens, d_model]."""
        return self._to(layer, RESID_POST, {RESID_MID: resid_mid})

    def resid_post_of(self, layer: int, z: Array, resid_pre: Array) -> Array:
        """hook_resid_post [tokens, d_model] from hook_z [tokens, heads, d_head] and hook_resid_pre [tokens, d_model]."""
        if not self.layout.parallel:
            return self.resid_post(layer, self.resid_mid(layer, z, resid_pre))
        return self._to(layer, RESID_POST, {Z: z, RESID_PRE: resid_pre})

    def mlp_out(self, layer: int, residual: Array) -> Array:
        """hook_mlp_out [tokens, d_model] from the residual stream that the MLP reads.

        Args:
            layer: The block.
            residual: hook_resid_mid [tokens, d_model]; hook_resid_pre where attention and MLP read the same.
        """
        return self._to(layer, MLP_OUT, {self.layout.read_by_mlp: residual})

    def mlp_out_from(self, layer: int, neurons: Mapping[str, Array]) -> Array:
        """hook_mlp_out [tokens, d_model] from its neurons.

        Args:
            layer: The block.
            neurons: The full name of each hook point that ``BlockLayout.neurons`` gives -> its values [tokens, d_mlp].
        """
        return self._rowwise(neurons, [in_block(layer, MLP_OUT)])[0]

    def end(self, resid_post: Array, output: str) -> Array:
        """``unembed.hook_in`` [tokens, d_model] or ``logits`` [tokens, d_vocab] from the last block's hook_resid_post.

        Args:
            resid_post: [tokens, d_model].
            output: Which of the two.
        """
        return self._rowwise({in_block(self.layout.n_layers - 1, RESID_POST): resid_post}, [output])[0]

    # Running them

    def _attention(self, layer: int) -> Runnable:
        """The piece from queries, keys and values to z."""
        return self._engine.part(self.layout.compared(layer), [in_block(layer, Z)], _SEEN)

    def _to(self, layer: int, output: str, given: Mapping[str, Array]) -> Array:
        """Runs a piece that works token by token on hook points of a block, to another of them."""
        return self._rowwise(
            {in_block(layer, name): array for name, array in given.items()}, [in_block(layer, output)]
        )[0]

    def _turned(
        self, layer: int, given: Mapping[str, Array], outputs: Sequence[str], positions: Array | None
    ) -> list[Array]:
        """Runs a piece that may rotate queries and keys."""
        return self._rowwise(given, outputs, {} if positions is None else {POSITIONS: positions})

    def _rowwise(
        self, given: Mapping[str, Array], outputs: Sequence[str], also: Mapping[str, Array] = {}
    ) -> list[Array]:
        """Runs a piece that works token by token on arrays [tokens, ...]."""
        session = self._engine.part(list(given), outputs, list(also))
        arrays = {name: array for name, array in {**given, **also}.items() if name in session.inputs}
        parts = []
        for start in range(0, len(next(iter(given.values()))), self._max_rows):
            feeds = {name: array[None, start : start + self._max_rows] for name, array in arrays.items()}
            parts.append([result[0] for result in session.run(session.outputs, feeds)])
        return [_joined(column) for column in zip(*parts, strict=True)]

    def _attend(self, session: Runnable, given: Mapping[str, Array], seen: Mapping[str, Array]) -> Array:
        """Runs a piece that ends in hook_z on arrays [rows, ...]; a mask of one row belongs to every row."""
        first, *_, values = given.values()
        # Every row holds a whole sequence of keys and values, however few queries it has.
        some = max(1, 2 * self._max_rows // values.shape[1])
        parts = []
        for start in range(0, len(first), some):
            here = {name: array[start : start + some] for name, array in given.items()}
            for name in session.inputs:
                if name in seen:
                    each = seen[name]
                    here[name] = each[start : start + some] if each.ndim == 4 and len(each) > 1 else each
            parts.append(session.run(session.outputs, here)[0])
        return _joined(parts)


def _joined(parts: Sequence[Array]) -> Array:
    """Arrays one after the other along their first axis; a sole one is not copied."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
