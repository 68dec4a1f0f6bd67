"""What one component changes along its direct paths: through the residual stream, with every head in between frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from graphlens.analysis.arrays import Array
from graphlens.engine.block_layout import ATTN_OUT, MLP_OUT, RESID_MID, RESID_POST, RESID_PRE, BlockLayout
from graphlens.engine.block_pieces import BlockPieces
from graphlens.experiments.entering import Entering
from graphlens.experiments.stages import Kept, Stage, Variant, entry
from graphlens.file.names import EMBEDDINGS, in_block, split_name


class DirectPaths:
    """Residual streams that differ from the corrupted run's by what one sender writes, and by what MLPs make of it.

    Heads always write what they wrote in the corrupted run.

    Args:
        pieces: The model in pieces.
        kept: What is kept of the corrupted run.
        frozen_mlps: Whether MLPs too write what they wrote; else they are computed again from the changed residual.
    """

    def __init__(self, pieces: BlockPieces, kept: Kept, frozen_mlps: bool) -> None:
        self._pieces, self._kept = pieces, kept
        self._frozen = frozen_mlps
        self._entering = Entering(pieces, kept, kept.tokens.shape[1])

    @staticmethod
    def needed(layout: BlockLayout) -> list[str]:
        """The activations of the corrupted run that are read, besides the senders' own.

        Args:
            layout: How the model's blocks are laid out.
        """
        names = dict.fromkeys((RESID_PRE, layout.read_by_mlp, RESID_POST, ATTN_OUT, MLP_OUT))
        return [in_block(layer, name) for layer in range(layout.n_layers) for name in names]

    def residuals(self, sender: Variant, last: int) -> Iterator[tuple[int, Array]]:
        """The residual stream before every layer after the sender.

        Args:
            sender: The patched component.
            last: The last layer to go to; n_layers for the end of the model.

        Yields:
            (layer, [b, p, d_model]); layer n_layers is what the unembedding reads.
        """
        at, stage = entry(sender.hook, self._pieces.layout)
        sender = replace(sender, start=0, stop=None)  # changes are carried at all positions
        arrays = self._entering.arrays(sender.hook, 0, [sender])
        batch, length = self._kept.tokens.shape
        if stage == Stage.Z:
            rows = arrays["z"].reshape(batch * length, *arrays["z"].shape[3:])
            change = self._pieces.attn_out(at, rows).reshape(batch, length, -1) - self._of(at, ATTN_OUT)
        elif stage == Stage.RESID_MID:
            change = arrays["resid_mid"][0] - self._of(at, RESID_MID)
        elif stage == Stage.RESID_POST:
            change = arrays["resid_pre"][0] - self._of(at, RESID_POST)
        else:
            change = arrays["resid_pre"][0] - self._of(at, RESID_PRE)
            yield at, arrays["resid_pre"][0]
        read = self._pieces.layout.read_by_mlp
        for layer in range(at, last):
            before_mlp = layer > at or self._comes_before_mlp(sender.hook)
            if before_mlp and not self._frozen and change.any():
                residual = self._of(layer, read) + change
                new = self._pieces.mlp_out(layer, residual.reshape(-1, residual.shape[-1])).reshape(residual.shape)
                change = change + (new - self._of(layer, MLP_OUT))
            yield layer + 1, self._of(layer, RESID_POST) + change

    def _comes_before_mlp(self, sender: str) -> bool:
        """Whether what a sender writes is read by the MLP of its own block."""
        if split_name(sender)[1] in EMBEDDINGS:
            return True
        return entry(sender, self._pieces.layout)[1] <= Stage.RESID_MID and not self._pieces.layout.parallel

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
