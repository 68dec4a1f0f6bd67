"""Edits that are the same at every position, put into the weights before or after the hook point: they cost nothing.

An edit x -> x * factor + addend of what a matrix reads or writes is an edit of that matrix and its bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphlens.edits import gate
from graphlens.edits.kinds import Intervention
from graphlens.edits.operand import aligned
from graphlens.edits.record import Array
from graphlens.edits.selection import Window, selected_by
from graphlens.file.manifest import HookEntry, Manifest, ModelConfig
from graphlens.file.names import axis_sizes, in_block, split_name
from graphlens.file.safetensors import apply_view, put_view
from graphlens.file.stored import StoredWeights
from graphlens.surgery.structure import Structure
from graphlens.surgery.sublayers import Sublayer, sublayers, sums

Folded = dict[tuple[str, str], Array]  # (weights file, tensor) -> its new content
ByHook = dict[str, list[Intervention]]


@dataclass(frozen=True)
class _Target:
    """The weights that an edit can go into, and how.

    Attributes:
        how: "written" if the matrix writes the hook point, "read" if it reads it, "added" if the hook point is a sum.
        part: The sublayer that they are of.
        bias: The bias of the matrix, or that is part of the sum.
        matrix: The matrix; None for a sum, which takes additions only.
    """

    how: Literal["written", "read", "added"]
    part: Sublayer
    bias: str
    matrix: str | None = None


def fold(model: ir.Model, manifest: Manifest, by_hook: ByHook) -> tuple[ByHook, Folded]:
    """Puts those edits into the weights that can go there.

    Args:
        model: The hooked model, which stays as it is.
        manifest: Its manifest.
        by_hook: The interventions at each hook point, in the order in which they apply.

    Returns:
        (the edits that have to stay nodes, the new content of the weights that took in the others).
    """
    weights, structure = _Weights(model, manifest), Structure(model, manifest)
    left: ByHook = {}
    for hook in [name for name in manifest.hooks if name in by_hook]:
        items = by_hook[hook]
        target = _target(hook, by_hook, items, manifest.config)
        change = None if target is None else affine(items, manifest.hooks[hook], manifest)
        if target is None or change is None:
            left[hook] = items
            continue
        # What folds lies at hook points [batch, pos, ...]: a matrix knows neither of these.
        factor, addend = (part[0, 0] for part in change)
        if weights.take(target, addend) and _is_so(structure, hook, target, manifest.config):
            weights.apply(target, factor, addend)
        else:
            left[hook] = items
    return left, weights.changed


def _target(
    hook: str, by_hook: Mapping[str, Sequence[Intervention]], items: Sequence[Intervention], config: ModelConfig
) -> _Target | None:
    """The weights that the edit at a hook point can go into; None where there are none.

    Nothing may be edited between the hook point and the weights: it would see another value than without folding.
    """
    layer, rest = split_name(hook)
    if layer is None:
        return None
    result = in_block(layer, "attn.hook_result")
    parts = sublayers(config, layer)
    for part in parts:
        if hook in part.readers:
            matrix, bias = part.readers[hook]
            return _Target("written", part, bias, matrix)
        if hook == part.inner or (hook == part.written and part.post is None):
            if result in by_hook and part is parts[0]:
                return None
            matrix, bias = part.out
            return _Target("read" if hook == part.inner else "written", part, bias, matrix)
    # A block's resid_post is the next one's resid_pre.
    if rest == "hook_resid_pre" and layer > 0:
        layer, rest = layer - 1, "hook_resid_post"
    last = sublayers(config, layer)[0 if rest == "hook_resid_mid" else -1]
    total = in_block(layer, rest)
    # Of a sum, what is added may as well be added to the bias before.
    if total not in sums(config, layer) or last.post is not None or any(item.part != "add" for item in items):
        return None
    others = {last.written, in_block(layer, "attn.hook_result"), *({total} - {hook})}
    return None if others & set(by_hook) else _Target("added", last, last.out[1])


def _is_so(structure: Structure, hook: str, target: _Target, config: ModelConfig) -> bool:
    """True if the graph computes with the target's weights what folding takes it to compute: no norm comes between."""
    part = target.part
    if hook in part.readers:
        return structure.reads(part, hook)
    if not structure.is_linear(part.inner, structure.summed(part), part.out):
        return False
    if target.how != "added":
        return True
    layer = split_name(part.written)[0]
    assert layer is not None
    total, terms = next((total, terms) for total, terms in sums(config, layer).items() if terms[-1] == part.written)
    return structure.is_sum(total, terms)


def affine(items: Sequence[Intervention], entry: HookEntry, manifest: Manifest) -> tuple[Array, Array] | None:
    """What the interventions at one hook point come to where they are the same at every position.

    Args:
        items: The interventions, in the order in which they apply.
        entry: The hook point.
        manifest: The model's manifest.

    Returns:
        (factor, addend) of x -> x * factor + addend, in the activation's dtype and with its axes; those that only a run
        knows the size of (batch, positions, keys) have size 1. None where the edit differs along one of these, holds NaN or
        infinities, or is no such map.

    Raises:
        InputError: For an operand that does not fit the hook point.
    """
    sizes, field_of = entry.sizes(axis_sizes(manifest.config)), selected_by(entry.axes)
    dynamic = [index for index, name in enumerate(entry.axes) if name not in sizes]
    for item in items:
        shape = aligned(item, entry.axes).shape
        if any(shape[index] != 1 or item.chosen(field_of.get(entry.axes[index])) is not None for index in dynamic):
            return None
        if not np.isfinite(item.array).all():
            return None
    parts = gate.compose(items, entry, sizes, Window.whole(1, 1))
    if parts.keys() - {"scale", "add", "where", "patch"}:
        return None
    full = tuple(sizes.get(name, 1) for name in entry.axes)

    def whole(part: str) -> Array:
        """An input of the gate over all elements."""
        return np.broadcast_to(parts.get(part, gate.neutral(part, entry.dtype)), full)

    where = whole("where")
    factor = np.where(where, np.dtype(entry.dtype).type(0), whole("scale"))
    return factor, np.where(where, whole("patch"), whole("add"))


class _Weights:
    """Weights by TransformerLens name, copied when they are first changed."""

    def __init__(self, model: ir.Model, manifest: Manifest) -> None:
        self._stored = StoredWeights(model, manifest)
        self.changed: Folded = {}

    def take(self, target: _Target, addend: Array) -> bool:
        """True if the target's weights are in the file, as float32. A bias is not needed where nothing is added."""
        bias = self._stored.entry(target.bias)
        if bias is None and (target.matrix is None or addend.any()):
            return False
        found = [bias, *([] if target.matrix is None else [self._stored.entry(target.matrix)])]
        return all(entry is None or entry.dtype == "F32" for entry in found) and found[-1] is not None

    def _change(self, name: str, change: Callable[[Array], Array]) -> None:
        """Replaces a weight by what is made of it; a bias that there is none of stays away."""
        if self._stored.entry(name) is None:
            return
        view = self._stored.views[name]
        key = (view.file, view.tensor)
        if key not in self.changed:
            self.changed[key] = np.array(self._stored.array(name))
        put_view(self.changed[key], view, change(apply_view(self.changed[key], view)))

    def apply(self, target: _Target, factor: Array, addend: Array) -> None:
        """Folds x -> x * factor + addend of what the matrix reads, or writes, or of a sum that its bias is part of."""
        if target.matrix is None:
            self._change(target.bias, lambda b: b + addend)
        elif target.how == "read":
            # W_O [h, d, D] read by z [h, d]; W_out [M, D] read by post [M].
            w = apply_view(self._now(target.matrix), self._stored.views[target.matrix])
            self._change(target.bias, lambda b: b + np.tensordot(addend, w, axes=addend.ndim))
            self._change(target.matrix, lambda w: w * factor[..., None])
        else:
            # W_Q [h, D, d] writes q [h, d]; W_in [D, M] writes pre [M]; W_O [h, d, D] writes [D].
            self._change(target.matrix, lambda w: w * (factor[:, None, :] if factor.ndim == 2 else factor))
            self._change(target.bias, lambda b: b * factor + addend)

    def _now(self, name: str) -> Array:
        """The tensor that a weight is a view of, with what was folded into it so far."""
        view = self._stored.views[name]
        return self.changed.get((view.file, view.tensor), self._stored.array(name))
