"""Edits that are the same at every position, put into the weights before or after the hook point: they cost nothing.

An edit x -> x * factor + addend of what a matrix reads or writes is an edit of that matrix and its bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphlens.edits import gate
from graphlens.edits.kinds import Intervention
from graphlens.edits.operand import aligned
from graphlens.edits.record import Array
from graphlens.edits.selection import Window, selected_by
from graphlens.file.manifest import HookEntry, Manifest
from graphlens.file.names import axis_sizes, in_block, split_name
from graphlens.file.safetensors import apply_view
from graphlens.file.stored import StoredWeights
from graphlens.surgery.structure import Structure

Folded = dict[tuple[str, str], Array]  # (weights file, tensor) -> its new content
ByHook = dict[str, list[Intervention]]

# Hook points that a matrix writes: the matrix, its bias. And those that one reads.
_WRITTEN = {
    "attn.hook_q": ("attn.W_Q", "attn.b_Q"),
    "attn.hook_k": ("attn.W_K", "attn.b_K"),
    "attn.hook_v": ("attn.W_V", "attn.b_V"),
    "mlp.hook_pre": ("mlp.W_in", "mlp.b_in"),
    "hook_attn_out": ("attn.W_O", "attn.b_O"),
    "hook_mlp_out": ("mlp.W_out", "mlp.b_out"),
}
_READ = {"attn.hook_z": ("attn.W_O", "attn.b_O"), "mlp.hook_post": ("mlp.W_out", "mlp.b_out")}
# Sums in which what is added may as well be added to the bias before: the bias, and what must be unedited in between.
_ADDED = {"hook_resid_mid": ("attn.b_O", "hook_attn_out"), "hook_resid_post": ("mlp.b_out", "hook_mlp_out")}


@dataclass(frozen=True)
class _Target:
    """The weights that an edit can go into, and how.

    Attributes:
        how: "written" if the matrix writes the hook point, "read" if it reads it, "added" if the hook point is a sum.
        bias: The bias of the matrix, or that is part of the sum.
        matrix: The matrix; None for a sum, which takes additions only.
    """

    how: Literal["written", "read", "added"]
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
        target = _target(hook, by_hook, items)
        change = None if target is None else affine(items, manifest.hooks[hook], manifest)
        if target is None or change is None or not weights.has(target) or not _is_so(structure, hook, target):
            left[hook] = items
        else:
            # What folds lies at hook points [batch, pos, ...]: a matrix knows neither of these.
            factor, addend = (part[0, 0] for part in change)
            weights.apply(target, factor, addend)
    return left, weights.changed


def _target(hook: str, by_hook: Mapping[str, Sequence[Intervention]], items: Sequence[Intervention]) -> _Target | None:
    """The weights that the edit at a hook point can go into; None where there are none.

    Nothing may be edited between the hook point and the weights: it would see another value than without folding.
    """
    layer, rest = split_name(hook)
    if layer is None:
        return None
    if rest in _WRITTEN or rest in _READ:
        if in_block(layer, "attn.hook_result") in by_hook and rest in ("attn.hook_z", "hook_attn_out"):
            return None
        matrix, bias = (_WRITTEN if rest in _WRITTEN else _READ)[rest]
        return _Target("written" if rest in _WRITTEN else "read", in_block(layer, bias), in_block(layer, matrix))
    # A block's residual_post is the next one's resid_pre.
    if rest == "hook_resid_pre" and layer > 0:
        layer, rest = layer - 1, "hook_resid_post"
    if rest not in _ADDED or any(item.part != "add" for item in items):
        return None
    bias, between = _ADDED[rest]
    others = {in_block(layer, between), in_block(layer, "attn.hook_result")}
    if rest == "hook_resid_post" and hook != in_block(layer, rest):
        others.add(in_block(layer, rest))
    return None if others & set(by_hook) else _Target("added", in_block(layer, bias))


def _is_so(structure: Structure, hook: str, target: _Target) -> bool:
    """True if the graph computes with the target's weights what folding takes it to compute: no norm comes between."""
    layer = split_name(target.bias)[0]
    assert layer is not None
    part, kind = ("attn", "O") if target.bias.endswith("attn.b_O") else ("mlp", "out")
    out, source = (
        in_block(layer, f"hook_{part}_out"),
        in_block(layer, "attn.hook_z" if part == "attn" else "mlp.hook_post"),
    )
    if target.how == "written" and hook != out:
        norm = in_block(layer, "ln2" if split_name(hook)[1].startswith("mlp") else "ln1")
        names = [f"{norm}.w", f"{norm}.b", str(target.matrix), target.bias]
        return structure.is_linear(f"{norm}.hook_normalized", hook, names)
    if not structure.is_linear(source, out, [in_block(layer, f"{part}.W_{kind}"), target.bias]):
        return False
    if target.how != "added":
        return True
    before, after = ("pre", "mid") if part == "attn" else ("mid", "post")
    terms = [in_block(layer, f"hook_resid_{before}"), out]
    return structure.is_sum(in_block(layer, f"hook_resid_{after}"), terms)


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
    sizes, field_of = axis_sizes(manifest.config), selected_by(entry.axes)
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

    def has(self, target: _Target) -> bool:
        """True if the target's weights are in the file, as float32."""
        entries = (self._stored.entry(name) for name in (target.matrix, target.bias) if name)
        return all(entry is not None and entry.dtype == "F32" for entry in entries)

    def _writable(self, name: str) -> Array:
        """A weight that may be changed in place."""
        view = self._stored.views[name]
        key = (view.file, view.tensor)
        if key not in self.changed:
            self.changed[key] = np.array(self._stored.array(name))
        return apply_view(self.changed[key], view)

    def apply(self, target: _Target, factor: Array, addend: Array) -> None:
        """Folds x -> x * factor + addend of what the matrix reads, or writes, or of a sum that its bias is part of."""
        b = self._writable(target.bias)
        if target.matrix is None:
            b += addend
            return
        w = self._writable(target.matrix)
        if target.how == "read":
            # W_O [h, d, D] read by z [h, d]; W_out [M, D] read by post [M].
            b += np.tensordot(addend, w, axes=addend.ndim)
            w *= factor[..., None]
        else:
            # W_Q [h, D, d] writes q [h, d]; W_in [D, M] writes pre [M]; W_O [h, d, D] writes [D].
            w *= factor[:, None, :] if factor.ndim == 2 else factor
            b *= factor
            b += addend
