"""How a change travels along direct paths: from one component through the residual stream, every head in between frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy.typing as npt

from graphlens.engine.block_pieces import BlockPieces
from graphlens.experiments.recompute import Corrupted, Recomputation, Stage, Variant

Array = npt.NDArray[Any]


class DirectPaths:
    """Residual streams that differ from the corrupted run's by what one sender writes, and by what MLPs make of it.

    ``frozen_mlps``: MLPs write what they wrote in the corrupted run; else they are computed again from the changed
    residual. Heads always write what they wrote.
    """

    def __init__(self, pieces: BlockPieces, run: Corrupted, n_layers: int, frozen_mlps: bool, max_tokens: int) -> None:
        self._pieces, self._run, self._layers = pieces, run, n_layers
        self._frozen = frozen_mlps
        self._entries = Recomputation(pieces, run, n_layers, None, max_tokens)

    @staticmethod
    def needed(n_layers: int) -> list[str]:
        """The activations of the corrupted run that it reads, besides the senders' own."""
        names = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
        return [f"blocks.{layer}.{name}" for layer in range(n_layers) for name in names]

    def residuals(self, sender: Variant, last: int) -> Iterator[tuple[int, Array]]:
        """(layer, the residual before that block [b, pos, d_model]) for every layer after the sender up to ``last``;
        layer n_layers is what the unembedding reads."""
        at, stage = sender.entry
        sender = replace(sender, start=0, stop=None)  # what is carried has every position
        arrays = self._entries.entering(sender)
        batch, length = self._run.tokens.shape
        if stage == Stage.MIXED:
            flat = [arrays[name].reshape(-1, *arrays[name].shape[3:]) for name in ("z", "resid")]
            change = self._pieces.resid_mid(at, *flat).reshape(batch, length, -1) - self._kept(at, "hook_resid_mid")
        elif stage == Stage.BETWEEN:
            change = arrays["mid"][0] - self._kept(at, "hook_resid_mid")
        elif stage == Stage.AFTER:
            change = arrays["resid"][0] - self._kept(at, "hook_resid_post")
        else:
            change = arrays["resid"][0] - self._kept(at, "hook_resid_pre")
            yield at, arrays["resid"][0]
        for layer in range(at, last):
            before_mlp = stage not in (Stage.AFTER,) or layer > at
            if before_mlp and not self._frozen and change.any():
                between = self._kept(layer, "hook_resid_mid") + change
                after = self._pieces.resid_post(layer, between.reshape(-1, between.shape[-1])).reshape(between.shape)
                change = after - self._kept(layer, "hook_resid_post")
            yield layer + 1, self._kept(layer, "hook_resid_post") + change

    def _kept(self, layer: int, name: str) -> Array:
        found: Array = self._run.activations[f"blocks.{layer}.{name}"]
        return found

    def receivers(self, layer: int, residual: Array) -> Sequence[Array]:
        """q, k, v [b, pos, heads, d_head] of a block from the residual before it."""
        flat = residual.reshape(-1, residual.shape[-1])
        found = self._pieces.qkv(layer, flat)
        return [array.reshape(*residual.shape[:2], *array.shape[1:]) for array in found]
