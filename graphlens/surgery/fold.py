"""Edits that are the same at every position, put into the weights before or after the hook point: they cost nothing.

An edit x -> x * factor + addend of what a matrix reads or writes is an edit of that matrix and its bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphlens.edits import gate
from graphlens.edits.gate import Window
from graphlens.edits.kinds import Intervention, Steer
from graphlens.file.manifest import HookEntry, Manifest
from graphlens.file.names import axis_sizes, firing_order, split_name
from graphlens.file.safetensors import Array, apply_view
from graphlens.surgery.stored import StoredWeights

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


def fold(model: ir.Model, manifest: Manifest, by_hook: ByHook) -> tuple[ByHook, Folded]:
    """(the edits that stay nodes, the weights that took in the others)."""
    weights = _Weights(model, manifest)
    left: ByHook = {}
    for hook in firing_order(by_hook, manifest.config.n_layers):
        items = by_hook[hook]
        target = _target(hook, by_hook, manifest, items)
        change = None if target is None else affine(items, manifest.hooks[hook], manifest)
        if target is None or change is None or not weights.has(*target[1:]):
            left[hook] = items
        else:
            weights.apply(*target, *change)
    return left, weights.changed


def _target(
    hook: str, by_hook: Mapping[str, Sequence[Intervention]], manifest: Manifest, items: Sequence[Intervention]
) -> tuple[str, str | None, str] | None:
    """(how, matrix or None, bias) by which an edit can be folded; None where it cannot.

    Nothing may be edited between the hook point and the weights: it would see another value than without folding.
    """
    layer, rest = split_name(hook)
    if layer is None:
        return None
    at = f"blocks.{layer}."
    results_edited = f"{at}attn.hook_result" in by_hook
    if rest in _WRITTEN or rest in _READ:
        if results_edited and rest in ("attn.hook_z", "hook_attn_out"):
            return None
        how = "written" if rest in _WRITTEN else "read"
        matrix, bias = (_WRITTEN if rest in _WRITTEN else _READ)[rest]
        return how, at + matrix, at + bias
    # A block's residual_post is the next one's resid_pre.
    if rest == "hook_resid_pre" and layer > 0:
        at, rest = f"blocks.{layer - 1}.", "hook_resid_post"
    if rest not in _ADDED or not all(isinstance(item, Steer) for item in items):
        return None
    bias, between = _ADDED[rest]
    others = {f"{at}{between}", f"{at}attn.hook_result"}
    if rest == "hook_resid_post" and hook != f"{at}{rest}":
        others.add(f"{at}{rest}")
    return None if others & set(by_hook) else ("added", None, at + bias)


def affine(items: Sequence[Intervention], entry: HookEntry, manifest: Manifest) -> tuple[Array, Array] | None:
    """(factor, addend) over the axes after batch and position; None where the edit depends on these, or is not finite."""
    dynamic = [index for index, name in enumerate(entry.axes) if name not in axis_sizes(manifest.config)]
    for item in items:
        shape = (1,) * (len(entry.axes) - item.array.ndim) + item.array.shape
        if item.positions is not None or item.batch is not None or any(shape[index] != 1 for index in dynamic):
            return None
        if not np.isfinite(item.array).all():
            return None
    sizes = axis_sizes(manifest.config)
    parts = gate.compose(items, entry, sizes, Window(1, 0, 1, 1, 1))
    kept = tuple(sizes[name] for index, name in enumerate(entry.axes) if index not in dynamic)
    dtype = np.dtype(entry.dtype)

    def whole(part: str) -> Array:
        array = parts.get(part, gate.neutral(part, entry.dtype))
        return np.broadcast_to(array, (1,) * len(dynamic) + kept).reshape(kept)

    where = whole("where")
    factor = np.where(where, dtype.type(0), whole("scale"))
    return factor, np.where(where, whole("patch"), whole("add"))


class _Weights:
    """Weights by TransformerLens name, copied when they are first changed."""

    def __init__(self, model: ir.Model, manifest: Manifest) -> None:
        self._stored = StoredWeights(model, manifest)
        self.changed: Folded = {}

    def has(self, matrix: str | None, bias: str) -> bool:
        """Whether the model has these weights, in float32."""
        entries = (self._stored.entry(name) for name in (matrix, bias) if name)
        return all(entry is not None and entry.dtype == "F32" for entry in entries)

    def _writable(self, name: str) -> Array:
        view = self._stored.views[name]
        key = (view.file, view.tensor)
        if key not in self.changed:
            self.changed[key] = np.array(self._stored.array(name))
        return apply_view(self.changed[key], view)

    def apply(self, how: str, matrix: str | None, bias: str, factor: Array, addend: Array) -> None:
        """Folds x -> x * factor + addend of what the matrix reads, or writes, or of a sum that its bias is part of."""
        b = self._writable(bias)
        if matrix is None:
            b += addend
            return
        w = self._writable(matrix)
        if how == "read":
            # W_O [h, d, D] read by z [h, d]; W_out [M, D] read by post [M].
            b += np.tensordot(addend, w, axes=addend.ndim)
            w *= factor[..., None]
        else:
            # W_Q [h, D, d] writes q [h, d]; W_in [D, M] writes pre [M]; W_O [h, d, D] writes [D].
            w *= factor[:, None, :] if factor.ndim == 2 else factor
            b *= factor
            b += addend
