"""What one component changes along its direct paths: through the residual stream, with every head in between frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from graphlens.analysis.arrays import Array
from graphlens.engine.block_pieces import BlockPieces
from graphlens.experiments.recompute import Kept, Recomputation
from graphlens.experiments.stages import Stage, Variant
from graphlens.file.names import in_block


class DirectPaths:
    """Residual streams that differ from the corrupted run's by what one sender writes, and by what MLPs make of it.

    Heads always write what they wrote in the corrupted run.

    Args:
        pieces: The model in pieces.
        kept: What is kept of the corrupted run.
        n_layers: The number of blocks.
        frozen_mlps: Whether MLPs too write what they wrote; else they are computed again from the changed residual.
        max_tokens: How many tokens are computed at once.
    """

    def __init__(self, pieces: BlockPieces, kept: Kept, n_layers: int, frozen_mlps: bool, max_tokens: int) -> None:
        self._pieces, self._kept, self._layers = pieces, kept, n_layers
        self._frozen = frozen_mlps
        self._entries = Recomputation(pieces, kept, n_layers, None, max_tokens)

    @staticmethod
    def needed(n_layers: int) -> list[str]:
        """The activations of the corrupted run that are read, besides the senders' own.

        Args:
            n_layers: The number of blocks.
        """
        names = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
        return [in_block(layer, name) for layer in range(n_layers) for name in names]

    def residuals(self, sender: Variant, last: int) -> Iterator[tuple[int, Array]]:
        """The residual stream before every layer after the sender.

        Args:
            sender: The patched component.
            last: The last layer to go to; n_layers for the end of the model.

        Yields:
            (layer, [b, p, d_model]); layer n_layers is what the unembedding reads.
        """
        at, stage = sender.entry
        sender = replace(sender, start=0, stop=None)  # changes are carried at all positions
        arrays = self._entries.entering(sender)
        batch, length = self._kept.tokens.shape
        if stage == Stage.Z:
            rows = [arrays[name].reshape(-1, *arrays[name].shape[3:]) for name in ("z", "resid_pre")]
            change = self._pieces.resid_mid(at, *rows).reshape(batch, length, -1) - self._of(at, "hook_resid_mid")
        elif stage == Stage.RESID_MID:
            change = arrays["resid_mid"][0] - self._of(at, "hook_resid_mid")
        elif stage == Stage.RESID_POST:
            change = arrays["resid_pre"][0] - self._of(at, "hook_resid_post")
        else:
            change = arrays["resid_pre"][0] - self._of(at, "hook_resid_pre")
            yield at, arrays["resid_pre"][0]
        for layer in range(at, last):
            before_mlp = stage != Stage.RESID_POST or layer > at
            if before_mlp and not self._frozen and change.any():
                middle = self._of(layer, "hook_resid_mid") + change
                after = self._pieces.resid_post(layer, middle.reshape(-1, middle.shape[-1])).reshape(middle.shape)
                change = after - self._of(layer, "hook_resid_post")
            yield layer + 1, self._of(layer, "hook_resid_post") + change

    def _of(self, layer: int, name: str) -> Array:
        return self._kept.activations[in_block(layer, name)]

    def receivers(self, layer: int, residual: Array) -> Sequence[Array]:
        """The q, k and v of a block.

        Args:
            layer: The block.
            residual: The residual stream before it, [b, p, d_model].

        Returns:
            Three arrays [b, p, heads, d_head].
        """
        found = self._pieces.qkv(layer, residual.reshape(-1, residual.shape[-1]))
        return [array.reshape(*residual.shape[:2], *array.shape[1:]) for array in found]
