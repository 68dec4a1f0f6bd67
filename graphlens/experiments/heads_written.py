"""What heads write to the residual stream: their outputs through W_O, and through a norm where one comes after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from graphlens.analysis.arrays import Array
from graphlens.analysis.edges import Node
from graphlens.engine.block_layout import BlockLayout, Z
from graphlens.engine.block_pieces import BlockPieces
from graphlens.errors import InputError
from graphlens.file.names import in_block

if TYPE_CHECKING:
    from graphlens.file.manifest import ModelConfig
    from graphlens.model.weights import Weights


class HeadsWritten:
    """What the heads of a model write for their hook_z.

    A norm after attention divides the sum of all heads by a scale. Each head's part is divided by that scale, so that the
    parts sum to hook_attn_out less its bias.

    Args:
        weights: The model's weights.
        config: Its config.
        layout: How its blocks are laid out.

    Attributes:
        scales: The hook point of the norm's scale in a block; empty where there is no such norm.

    Raises:
        InputError: For a norm whose scale does not make the heads' parts sum up.
    """

    def __init__(self, weights: Weights, config: ModelConfig, layout: BlockLayout) -> None:
        self._weights = weights
        after = "ln1" if config.post_norm_only else "ln1_post"
        self._norm = after if config.post_norm_only or layout.has(0, "ln1_post.hook_scale") else ""
        self.scales = [f"{self._norm}.hook_scale"] if self._norm else []
        biased = any(self.bias(layer).any() for layer in range(config.n_layers))
        if self._norm and (biased or config.normalization_type != "RMS"):
            raise InputError(
                f"this model normalises the sum of its heads' outputs ({self._norm}) in a way that cannot be shared out among "
                "them: it has a bias in it. So its heads have no edges of their own."
            )

    def of(self, layer: int, activations: Mapping[str, Array]) -> dict[Node, Array]:
        """What each head of a block writes [b, p, d_model].

        Args:
            layer: The block.
            activations: By hook name; its hook_z [b, p, head, d_head] and ``scales`` are read.
        """
        z = activations[in_block(layer, Z)]
        w_o = self._weights[in_block(layer, "attn.W_O")].astype(z.dtype)
        found = {Node("head", layer, head): z[:, :, head] @ w_o[head] for head in range(z.shape[2])}
        if not self._norm:
            return found
        name = in_block(layer, f"{self._norm}.w")
        weight = self._weights[name].astype(z.dtype) if name in self._weights else 1.0
        scale = activations[in_block(layer, self.scales[0])]
        return {node: written / scale * weight for node, written in found.items()}

    def changed(self, layer: int, new: Mapping[str, Array], old: Mapping[str, Array]) -> dict[Node, Array]:
        """What each head of a block writes in one run minus what it writes in another [b, p, d_model].

        Args:
            layer: The block.
            new: The activations of the one run; see ``of``.
            old: Those of the other.
        """
        if not self._norm:
            name = in_block(layer, Z)
            return self.of(layer, {name: new[name] - old[name]})
        before = self.of(layer, old)
        return {node: written - before[node] for node, written in self.of(layer, new).items()}

    def found(self, pieces: BlockPieces, layer: int, z: Array) -> dict[str, Array]:
        """The activations that ``of`` reads, from hook_z.

        Args:
            pieces: The model in pieces.
            layer: The block.
            z: [b, p, head, d_head].
        """
        rows = z.reshape(-1, *z.shape[2:])
        scales = {
            in_block(layer, name): pieces.attn_out(layer, rows, name).reshape(*z.shape[:2], 1) for name in self.scales
        }
        return {in_block(layer, Z): z, **scales}

    def bias(self, layer: int) -> Array:
        """What a block's attention writes whatever its heads do [d_model].

        Args:
            layer: The block.
        """
        return self._weights[in_block(layer, "attn.b_O")]
