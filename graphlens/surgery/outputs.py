"""Which values a model returns: exposing hook points, stripping them, and pruning what no output needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from graphlens.file.names import UNEMBEDDED, unknown_hook
from graphlens.surgery.graph import LOGITS, ensure_hooks_resolve, read_manifest, values_by_name, write_manifest


def _resolve(model: ir.Model, names: Iterable[str]) -> list[str]:
    """Hook names (or ``logits``) -> the distinct values that carry them, in firing order."""
    manifest = read_manifest(model)
    known = list(manifest.hooks)
    wanted = set()
    for name in names:
        if name != LOGITS and name not in manifest.hooks:
            raise unknown_hook(name, known, manifest.config.n_layers)
        wanted.add(name)
    carried = [manifest.hooks[name].value for name in known if name in wanted]
    return list(dict.fromkeys([*carried, *([LOGITS] if LOGITS in wanted else [])]))


def _set_outputs(model: ir.Model, value_names: Sequence[str]) -> None:
    values = values_by_name(model)
    model.graph.outputs.clear()
    model.graph.outputs.extend(values[name] for name in value_names)


def expose(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy that returns ``logits`` and the named hook points (hook points sharing a value share an output).

    Nothing else changes. Raises UnknownHookPoint.
    """
    value_names = [LOGITS, *(name for name in _resolve(model, names) if name != LOGITS)]
    model = model.clone()
    _set_outputs(model, value_names)
    return ensure_hooks_resolve(model)


def strip(model: ir.Model) -> ir.Model:
    """A copy that returns ``logits`` alone: the graph without a trace of its hooks being read."""
    return expose(model, ())


def prune(model: ir.Model, outputs: Iterable[str]) -> ir.Model:
    """A copy that returns only ``outputs`` (hook names or ``logits``) and holds only what they need.

    Fetching fewer outputs of a session skips no work; a pruned graph does (stop at a layer, say). The hook map keeps
    the hook points that are still computed. Raises UnknownHookPoint.
    """
    value_names = _resolve(model, outputs)
    model = model.clone()
    _set_outputs(model, value_names)
    optional = [value for value in model.graph.inputs if value.name in model.graph.initializers]
    common_passes.RemoveUnusedNodesPass()(model)
    for value in optional:
        if not value.uses() and not value.is_graph_output():
            model.graph.initializers.pop(str(value.name), None)
            model.graph.inputs.remove(value)
    return _without_lost_hooks(model)


def _without_lost_hooks(model: ir.Model) -> ir.Model:
    manifest, alive = read_manifest(model), values_by_name(model).keys()
    write_manifest(model, manifest.with_hooks({n: h for n, h in manifest.hooks.items() if h.value in alive}))
    return ensure_hooks_resolve(model)


def keep_results(model: ir.Model) -> ir.Model:
    """A copy that returns only what a run is for: logits (or the residual of a segment) and present keys and values."""
    model = model.clone()
    hooked = {entry.value for entry in read_manifest(model).hooks.values()} - {LOGITS}
    kept = [value for value in model.graph.outputs if value.name not in hooked]
    model.graph.outputs.clear()
    model.graph.outputs.extend(kept)
    return ensure_hooks_resolve(model)


def without_logits(model: ir.Model) -> ir.Model:
    """A copy that stops where the unembedding begins: what that reads is an output in place of ``logits``.

    Raises UnknownHookPoint where the model has no ``unembed.hook_in``.
    """
    (end,) = _resolve(model, [UNEMBEDDED])
    kept = [str(value.name) for value in model.graph.outputs if value.name not in (LOGITS, end)]
    model = model.clone()
    _set_outputs(model, [*kept, end])
    common_passes.RemoveUnusedNodesPass()(model)
    return _without_lost_hooks(model)
