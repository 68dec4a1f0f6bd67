"""How the blocks of a model are laid out where architectures differ, as its hook points tell."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from graphlens.file.names import EMBEDDINGS, in_block
from graphlens.file.residual import sums_in_block

if TYPE_CHECKING:
    from graphlens.engine.engine import Engine
    from graphlens.file.manifest import ModelConfig

RESID_PRE, RESID_MID, RESID_POST = "hook_resid_pre", "hook_resid_mid", "hook_resid_post"
ATTN_OUT, MLP_OUT = "hook_attn_out", "hook_mlp_out"
Z, QKV = "attn.hook_z", ("attn.hook_q", "attn.hook_k", "attn.hook_v")
ROTATED = {"attn.hook_q": "attn.hook_rot_q", "attn.hook_k": "attn.hook_rot_k"}
# What an MLP ends with, from its neurons on: these hook points together, as many of them as there are.
GATED = ("mlp.hook_pre", "mlp.hook_pre_linear")
NEURONS = (*GATED, "mlp.hook_post")


@dataclass(frozen=True)
class BlockLayout:
    """How a model's blocks are laid out.

    Attributes:
        config: The model's architecture.
        hooks: The names of the hook points of the plain model.
    """

    config: ModelConfig
    hooks: frozenset[str]

    @classmethod
    def of(cls, engine: Engine) -> BlockLayout:
        """The layout of a model.

        Args:
            engine: The model.
        """
        return cls(engine.manifest.config, frozenset(engine.hook_names))

    @property
    def n_layers(self) -> int:
        """The number of blocks."""
        return self.config.n_layers

    @cached_property
    def parallel(self) -> bool:
        """True if attention and MLP of a block read the same residual stream, so that there is none between them."""
        return not self.has(0, RESID_MID)

    @property
    def read_by_mlp(self) -> str:
        """The residual stream of a block that its MLP reads."""
        return RESID_PRE if self.parallel else RESID_MID

    def has(self, layer: int, name: str) -> bool:
        """True if a block has a hook point.

        Args:
            layer: The block.
            name: The hook point, without the block.
        """
        return in_block(layer, name) in self.hooks

    def rotates(self, layer: int) -> bool:
        """True if a block's queries and keys are rotated by their positions.

        Args:
            layer: The block.
        """
        return layer in self._rotating

    def compared(self, layer: int) -> tuple[str, str, str]:
        """The full names of a block's queries and keys as they are compared, and of its values.

        Args:
            layer: The block.
        """
        return self._compared[layer]

    @cached_property
    def _rotating(self) -> frozenset[int]:
        """The blocks whose queries and keys are rotated."""
        return frozenset(layer for layer in range(self.n_layers) if self.has(layer, ROTATED["attn.hook_q"]))

    @cached_property
    def _compared(self) -> list[tuple[str, str, str]]:
        """What ``compared`` returns, block by block: sweeps ask for it at every step."""
        q, k, v = QKV
        plain, rotated = (q, k, v), (ROTATED[q], ROTATED[k], v)
        return [
            (in_block(layer, names[0]), in_block(layer, names[1]), in_block(layer, names[2]))
            for layer in range(self.n_layers)
            for names in (rotated if self.rotates(layer) else plain,)
        ]

    def neurons(self, layer: int, name: str) -> list[str]:
        """The full names of the hook points that together with one of an MLP's neurons are all that its output needs.

        Args:
            layer: The block.
            name: One of NEURONS, without the block.
        """
        together = GATED if name in GATED else (name,)
        return [in_block(layer, other) for other in together if self.has(layer, other)]

    def summands(self, layer: int, name: str) -> tuple[list[str], str]:
        """What a residual stream is the sum of, where a hook point is one of its summands or ends in one.

        Args:
            layer: The block.
            name: A hook point of the embeddings, of an output of attention or of the MLP, without the block.

        Returns:
            (the full names of the summands, the full name of the residual stream). No summands where it is no sum of hook
            points, since it is normalised on the way.
        """
        if name in EMBEDDINGS:
            return [other for other in EMBEDDINGS if other in self.hooks], in_block(0, RESID_PRE)
        written = ATTN_OUT if name in (ATTN_OUT, "attn.hook_result") else MLP_OUT
        for total, terms in sums_in_block(self.config).items():
            if written in terms:
                return [in_block(layer, term) for term in terms if self.has(layer, term)], in_block(layer, total)
        return [], in_block(layer, RESID_POST)
