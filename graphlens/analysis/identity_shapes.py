"""The first identity: each hook point has the axes that its name says, and an axis has one size in the whole run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from graphlens.analysis.arrays import Array
from graphlens.analysis.identity_records import Identity
from graphlens.file.names import AFTER_BLOCKS, BEFORE_BLOCKS, BLOCK, Axes, axes_of, split_name

_ONE_OF_A_BATCH = ("hook_pos_embed", "embed.hook_pos_embed")  # may be there once for all prompts


def by_shape(activations: Mapping[str, Array], past: bool) -> tuple[dict[str, Array], list[Identity]]:
    """The activations whose shapes fit their names and each other, and an identity that does not hold for each other one.

    Args:
        activations: Hook name -> activation.
        past: True if the run had earlier tokens, so that there may be more keys than positions.

    Returns:
        Both. Of the sizes that an axis has, the one that most hook points have counts as right.
    """
    axes = {name: _axes(name, value.ndim) for name, value in activations.items()}
    votes: dict[str, Counter[int]] = {}
    for name, value in activations.items():
        own = axes[name]
        if own is not None and len(own) == value.ndim:
            for axis, size in zip(own, value.shape, strict=True):
                votes.setdefault(_kind(axis), Counter())[size] += 1
    sizes = {kind: counts.most_common(1)[0][0] for kind, counts in votes.items()}
    sizes["1"] = 1
    fitting: dict[str, Array] = {}
    broken: list[Identity] = []
    for name, value in activations.items():
        own = axes[name]
        if own is None or _fits(name, own, value.shape, sizes, past):
            fitting[name] = value
        else:
            words = f"the axes are {', '.join(own)}"
            broken.append(Identity(words, split_name(name)[0], (name,), math.inf, 0.0, (name,)))
    return fitting, broken


def _axes(name: str, count: int) -> Axes | None:
    """The axes of a hook point; None for one that the house does not name."""
    layer, rest = split_name(name)
    known = BLOCK if layer is not None else {**BEFORE_BLOCKS, **AFTER_BLOCKS}
    return axes_of(name, count) if rest in known else None


def _kind(axis: str) -> str:
    """An axis by what it counts: queries are positions."""
    return "pos" if axis == "query_pos" else axis


def _fits(name: str, axes: Axes, shape: tuple[int, ...], sizes: Mapping[str, int], past: bool) -> bool:
    """True if a shape fits a hook point's axes."""
    if len(axes) != len(shape):
        return False
    for axis, size in zip(axes, shape, strict=True):
        wanted = sizes[_kind(axis)]
        if axis == "key_pos" and not past and "pos" in sizes:
            wanted = max(wanted, sizes["pos"])
        once = axis == "batch" and size == 1 and name in _ONE_OF_A_BATCH
        if size != wanted and not once:
            return False
    return True
