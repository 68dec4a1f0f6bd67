"""Which values a model returns: exposing hook points, stripping them, and pruning what no output needs."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from graphlens.file.io_names import LOGITS, PRESENT
from graphlens.file.names import UNEMBEDDED, unknown_hook
from graphlens.surgery.graph import (
    drop_unused,
    ensure_hooks_resolve,
    finish,
    read_manifest,
    set_outputs,
    values_by_name,
)


def _resolve(model: ir.Model, names: Iterable[str]) -> list[str]:
    """Hook names (or ``logits``) -> the distinct values that carry them, in firing order."""
    manifest = read_manifest(model)
    wanted = set()
    for name in names:
        if name != LOGITS and name not in manifest.hooks:
            raise unknown_hook(name, list(manifest.hooks), manifest.config.n_layers)
        wanted.add(name)
    carried = [entry.value for name, entry in manifest.hooks.items() if name in wanted]
    return list(dict.fromkeys([*carried, *([LOGITS] if LOGITS in wanted else [])]))


def _returning(model: ir.Model, value_names: Iterable[str]) -> ir.Model:
    """A copy with the outputs of these names."""
    model = model.clone()
    values = values_by_name(model)
    set_outputs(model.graph, [values[name] for name in value_names])
    return model


def expose(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy that returns ``logits`` and hook points, and is otherwise the same.

    Args:
        model: A hooked model.
        names: Names of hook points. Those that share a value share an output.

    Returns:
        The copy. Its outputs are ``logits`` and the values of the hook points, in firing order; then the keys and values that
        an adopted model with a KV cache returns.

    Raises:
        UnknownHookPoint: The model has no hook point of that name.
    """
    present = [str(value.name) for value in model.graph.outputs if str(value.name).startswith(PRESENT)]
    value_names = [LOGITS, *(name for name in _resolve(model, names) if name != LOGITS), *present]
    return ensure_hooks_resolve(_returning(model, value_names))


def strip(model: ir.Model) -> ir.Model:
    """A copy that returns ``logits`` alone. Its hook points are still there, and can be exposed again.

    Args:
        model: A hooked model.

    Returns:
        The copy.
    """
    return expose(model, ())


def prune(model: ir.Model, outputs: Iterable[str]) -> ir.Model:
    """A copy that returns only some outputs, and holds only what they need.

    Fetching fewer outputs of a session skips no work; a pruned graph does (it may stop at a layer, say). The hook map
    keeps the hook points that are still computed.

    Args:
        model: A hooked model.
        outputs: Names of hook points, or ``logits``.

    Returns:
        The copy.

    Raises:
        UnknownHookPoint: The model has no hook point of that name.
    """
    model = _returning(model, _resolve(model, outputs))
    drop_unused(model)
    return _without_lost_hooks(model)


def _without_lost_hooks(model: ir.Model) -> ir.Model:
    """The model itself, its hook map without the hook points that are computed no more."""
    manifest, alive = read_manifest(model), values_by_name(model).keys()
    return finish(model, manifest.with_hooks({n: h for n, h in manifest.hooks.items() if h.value in alive}))


def keep_results(model: ir.Model) -> ir.Model:
    """A copy that returns only what a run is for: logits (or the residual of a segment), and present keys and values.

    Args:
        model: A hooked model.

    Returns:
        The copy.
    """
    hooked = {entry.value for entry in read_manifest(model).hooks.values()} - {LOGITS}
    model = model.clone()
    set_outputs(model.graph, [value for value in model.graph.outputs if value.name not in hooked])
    return ensure_hooks_resolve(model)


def without_logits(model: ir.Model) -> ir.Model:
    """A copy that stops where the unembedding begins: what that reads is an output in place of ``logits``.

    Args:
        model: A hooked model.

    Returns:
        The copy.

    Raises:
        UnknownHookPoint: The model has no ``unembed.hook_in``.
    """
    (end,) = _resolve(model, [UNEMBEDDED])
    kept = [str(value.name) for value in model.graph.outputs if value.name not in (LOGITS, end)]
    model = _returning(model, [*kept, end])
    common_passes.RemoveUnusedNodesPass()(model)
    return _without_lost_hooks(model)
