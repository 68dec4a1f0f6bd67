"""Where in a block a patch enters, and what has to be kept of the corrupted run for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np

from graphlens.analysis.arrays import Array
from graphlens.engine.block_layout import ATTN_OUT, MLP_OUT, NEURONS, RESID_MID, RESID_POST, RESID_PRE, BlockLayout
from graphlens.file.names import EMBEDDINGS, in_block, split_name


class Stage(IntEnum):
    """Where in a block a variant enters, by the hook points whose values it brings along."""

    RESID_PRE = 0
    QKV = 1  # queries and keys as they are compared, values and resid_pre
    Z = 2  # hook_z and resid_pre
    RESID_MID = 3
    RESID_POST = 4


# Where attention and MLP are side by side, what enters at RESID_MID here enters at RESID_POST: see ``entry``.
STAGES: Mapping[str, Stage] = {
    "hook_embed": Stage.RESID_PRE,
    "hook_pos_embed": Stage.RESID_PRE,
    "hook_resid_pre": Stage.RESID_PRE,
    "attn.hook_q": Stage.QKV,
    "attn.hook_k": Stage.QKV,
    "attn.hook_v": Stage.QKV,
    "attn.hook_rot_q": Stage.QKV,
    "attn.hook_rot_k": Stage.QKV,
    "attn.hook_attn_scores": Stage.Z,
    "attn.hook_pattern": Stage.Z,
    "attn.hook_z": Stage.Z,
    "attn.hook_result": Stage.RESID_MID,
    "hook_attn_out": Stage.RESID_MID,
    "hook_resid_mid": Stage.RESID_MID,
    "mlp.hook_pre": Stage.RESID_POST,
    "mlp.hook_pre_linear": Stage.RESID_POST,
    "mlp.hook_post": Stage.RESID_POST,
    "hook_mlp_out": Stage.RESID_POST,
    "hook_resid_post": Stage.RESID_POST,
}
ATTENTION = ("attn.hook_attn_scores", "attn.hook_pattern")
RESULT = "attn.hook_result"
# What they change is added to the residual stream as it is.
ADDED = (*EMBEDDINGS, RESULT, ATTN_OUT, *NEURONS, MLP_OUT)
Entry = tuple[int, Stage]


def entry(hook: str, layout: BlockLayout) -> Entry:
    """The block, and the stage in it, at which a patch enters.

    Args:
        hook: The hook point's name; one of STAGES.
        layout: How the model's blocks are laid out.
    """
    layer, rest = split_name(hook)
    stage = STAGES[rest]
    return layer or 0, Stage.RESID_POST if layout.parallel and stage == Stage.RESID_MID else stage


def position_axis(hook: str) -> int:
    """The axis of an activation that positions are counted on; at attention scores and patterns the queries' one.

    Args:
        hook: The hook point's name.
    """
    return 2 if split_name(hook)[1] in ATTENTION else 1


def needed(hooks: Sequence[str], layout: BlockLayout) -> list[str]:
    """The activations that the corrupted run must keep so that patches can be recomputed, sorted.

    Args:
        hooks: The hook points that are patched, one at least; their own activations are needed besides.
        layout: How the model's blocks are laid out.
    """
    kept = {in_block(layout.n_layers - 1, RESID_POST)}
    entries = {hook: entry(hook, layout) for hook in hooks}
    for layer in range(min(layer for layer, _ in entries.values()), layout.n_layers):
        kept |= {in_block(layer, RESID_PRE), *layout.compared(layer)[1:]}
    for hook, (layer, stage) in entries.items():
        rest = split_name(hook)[1]
        if stage == Stage.QKV:
            kept.add(layout.compared(layer)[0])
        if rest in NEURONS:
            kept |= {*layout.neurons(layer, rest), in_block(layer, MLP_OUT)}
        if rest in ADDED:
            summands, total = layout.summands(layer, rest)
            kept |= {*summands, total}
        if rest == RESULT:
            kept.add(in_block(layer, ATTN_OUT))
        if stage == Stage.RESID_MID:
            kept.add(in_block(layer, RESID_MID))
        if stage in (Stage.Z, Stage.RESID_MID, Stage.RESID_POST):
            kept.add(in_block(layer, RESID_POST))
        entered = layer + (0 if stage == Stage.RESID_PRE else 1)
        if stage != Stage.QKV and entered < layout.n_layers:
            kept.add(layout.compared(entered)[0])
    return sorted(kept)


@dataclass(frozen=True)
class Kept:
    """What is kept of the corrupted run.

    Attributes:
        activations: By hook name.
        tokens: bool [b, p], True at real tokens.
        patched: What the patches put in place, by hook name; broadcasts to the activation.
    """

    activations: Mapping[str, Array]
    tokens: Array
    patched: Mapping[str, Array]

    @cached_property
    def positions(self) -> Array:
        """int64 [b, p], each token's position: real tokens are counted from 0."""
        return np.maximum(np.cumsum(self.tokens, 1, dtype=np.int64) - 1, 0)


@dataclass(frozen=True)
class Variant:
    """A patched run.

    Attributes:
        index: Which of the sweep's sites it is.
        hook: The hook point that is patched.
        chosen: bool, the patched elements; broadcasts to the activation.
        start: The first position that changes.
        stop: The position after the last one that changes there; None where all from the first on may.
        made: Makes the patched activation, where it is this variant's alone; None where it is the one kept for all.
    """

    index: int
    hook: str
    chosen: Array
    start: int
    stop: int | None = None
    made: Callable[[], Array] | None = None
