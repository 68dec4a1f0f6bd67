"""Where in a block a patch enters, and what has to be kept of the corrupted run for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from graphlens.analysis.arrays import Array
from graphlens.file.names import in_block, split_name


class Stage(IntEnum):
    """Where in a block a variant enters, by the hook points whose values it brings along."""

    RESID_PRE = 0
    QKV = 1  # hook_q, hook_k, hook_v and resid_pre
    Z = 2  # hook_z and resid_pre
    RESID_MID = 3
    RESID_POST = 4


STAGES: Mapping[str, Stage] = {
    "hook_embed": Stage.RESID_PRE,
    "hook_pos_embed": Stage.RESID_PRE,
    "hook_resid_pre": Stage.RESID_PRE,
    "attn.hook_q": Stage.QKV,
    "attn.hook_k": Stage.QKV,
    "attn.hook_v": Stage.QKV,
    "attn.hook_attn_scores": Stage.Z,
    "attn.hook_pattern": Stage.Z,
    "attn.hook_z": Stage.Z,
    "attn.hook_result": Stage.RESID_MID,
    "hook_attn_out": Stage.RESID_MID,
    "hook_resid_mid": Stage.RESID_MID,
    "mlp.hook_pre": Stage.RESID_POST,
    "mlp.hook_post": Stage.RESID_POST,
    "hook_mlp_out": Stage.RESID_POST,
    "hook_resid_post": Stage.RESID_POST,
}
ATTENTION = ("attn.hook_attn_scores", "attn.hook_pattern")
_NEURONS = ("mlp.hook_pre", "mlp.hook_post")
QKV = {"q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v"}


def position_axis(hook: str) -> int:
    """The axis of an activation that positions are counted on; at attention scores and patterns the queries' one.

    Args:
        hook: The hook point's name.
    """
    return 2 if split_name(hook)[1] in ATTENTION else 1


def needed(hooks: Sequence[str], n_layers: int) -> list[str]:
    """The activations that the corrupted run must keep so that patches can be recomputed, sorted.

    Args:
        hooks: The hook points that are patched, one at least; their own activations are needed besides.
        n_layers: The number of blocks.
    """
    kept = {in_block(n_layers - 1, "hook_resid_post")}
    stages = {split_name(hook): STAGES[split_name(hook)[1]] for hook in hooks}
    first = min((layer or 0) for layer, _ in stages)
    for layer in range(first, n_layers):
        kept |= {in_block(layer, name) for name in ("hook_resid_pre", "attn.hook_k", "attn.hook_v")}
    for (layer_or_none, rest), stage in stages.items():
        layer = layer_or_none or 0
        if stage == Stage.QKV:
            kept.add(in_block(layer, "attn.hook_q"))
        if stage == Stage.RESID_MID or rest in _NEURONS:
            kept.add(in_block(layer, "hook_resid_mid"))
        if stage in (Stage.Z, Stage.RESID_MID, Stage.RESID_POST):
            kept.add(in_block(layer, "hook_resid_post"))
        entered = layer + (0 if stage == Stage.RESID_PRE else 1)
        if stage != Stage.QKV and entered < n_layers:
            kept.add(in_block(entered, "attn.hook_q"))
    return sorted(kept)


@dataclass(frozen=True)
class Variant:
    """A patched run.

    Attributes:
        index: Which of the sweep's sites it is.
        hook: The hook point that is patched.
        chosen: bool, the patched elements; broadcasts to the activation.
        start: The first position that changes.
        stop: The position after the last one that changes there; None where all from the first on may.
    """

    index: int
    hook: str
    chosen: Array
    start: int
    stop: int | None = None

    @property
    def entry(self) -> tuple[int, Stage]:
        """The block and the stage in it at which the patch enters."""
        layer, rest = split_name(self.hook)
        return layer or 0, STAGES[rest]
