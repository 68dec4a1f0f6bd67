"""Which part of a model a graph holds: from a block's residual on, up to a block's residual, with past keys and values."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.tape import Tape

from graphlens.errors import InputError
from graphlens.file.manifest import HookEntry, Manifest
from graphlens.file.names import BEFORE_BLOCKS, split_name
from graphlens.surgery.graph import (
    INPUT_IDS,
    LOGITS,
    ensure_hooks_resolve,
    read_manifest,
    values_by_name,
    write_manifest,
)
from graphlens.surgery.inputs import head_from_residual, head_with_past

RESIDUAL = "residual"  # the input of a graph that starts at a layer
STOPPED = "residual_out"  # the output of one that stops at a layer


def past_input(layer: int, part: str) -> str:
    """The name of a layer's cached keys or values [b, heads, past, d_head]; ``part`` is "key" or "value"."""
    return f"past_key_values.{layer}.{part}"


def present_output(layer: int, part: str) -> str:
    """The name of a layer's keys or values [b, heads, past + s, d_head] after the run."""
    return f"present.{layer}.{part}"


def segment(model: ir.Model, start: int | None = None, stop: int | None = None) -> ir.Model:
    """A copy that holds only blocks ``start`` (inclusive) to ``stop`` (exclusive): what is skipped is not there.

    With ``start`` (0 to n_layers) the graph reads ``residual`` [b, s, d_model] instead of ``input_ids``. With ``stop``
    (0 to n_layers) it returns ``residual_out``, the residual stream before block ``stop``, instead of ``logits``. The
    hook map keeps the hook points in between. Raises InputError for layers that the model has not.
    """
    manifest = read_manifest(model)
    layers = manifest.config.n_layers
    for what, layer in (("start", start), ("stop", stop)):
        if layer is not None and not 0 <= layer <= layers:
            raise InputError(f"{what} at layer {layer}: this model has {layers} layers, so it goes from 0 to {layers}.")
    if start is not None and stop is not None and start > stop:
        raise InputError(f"start at layer {start} comes after stop at layer {stop}: there is nothing to run.")
    model = model.clone()
    values = values_by_name(model)
    graph = model.graph
    hooks = {name: entry for name, entry in manifest.hooks.items() if _inside(name, layers, start, stop)}
    if stop is not None:
        node = ir.node("Identity", [values[_residual_value(manifest, stop)]], name=STOPPED)
        out = node.outputs[0]
        out.name, out.shape, out.type = STOPPED, node.inputs[0].shape, node.inputs[0].type  # type: ignore[union-attr]
        graph.append(node)
        end = out
    else:
        end = values[LOGITS]
    if start is not None:
        _start_at(model, values[_residual_value(manifest, start)], hooks, start, layers)
    values = values_by_name(model)
    graph.outputs.clear()
    graph.outputs.extend([end, *(values[n] for n in dict.fromkeys(h.value for h in hooks.values()) if n != LOGITS)])
    _drop_unused(model)
    write_manifest(model, manifest.with_hooks(hooks))
    return ensure_hooks_resolve(model, "the segment")


def _inside(name: str, layers: int, start: int | None, stop: int | None) -> bool:
    layer, rest = split_name(name)
    if layer is not None:
        return (start or 0) <= layer < (layers if stop is None else stop)
    return start is None if rest in BEFORE_BLOCKS else stop is None


def _residual_value(manifest: Manifest, layer: int) -> str:
    """The value of the residual stream before block ``layer``, before that block's own hook."""
    if layer == 0:
        return manifest.hooks["blocks.0.hook_resid_pre"].value
    return manifest.hooks[f"blocks.{layer - 1}.hook_resid_post"].value


def _start_at(model: ir.Model, old: ir.Value, hooks: dict[str, HookEntry], start: int, layers: int) -> None:
    """Lets ``old``'s consumers read a new input, in place; a hook point there moves with them."""
    graph = model.graph
    uses = tuple(old.uses())
    residual = ir.Value(name=RESIDUAL, shape=old.shape, type=old.type)
    tape = Tape()
    entered = tape.op("Identity", [residual])
    entered.name = f"blocks.{start}.hook_resid_pre" if start < layers else f"{RESIDUAL}/entered"
    entered.shape, entered.type = old.shape, old.type
    if old.name == entered.name:
        old.name = f"{old.name}/skipped"
    for node, index in uses:
        node.replace_input_with(index, entered)
    for node in tape.nodes:
        node.name = f"{RESIDUAL}/start"
    graph.insert_before(graph[0], list(tape.nodes))
    for value in [value for value in graph.inputs if value.name == INPUT_IDS]:
        graph.inputs.remove(value)
    graph.inputs.insert(0, residual)
    name = f"blocks.{start}.hook_resid_pre"
    if name in hooks:
        hooks[name] = replace(hooks[name], value=name)
    if any(value.name == "positions" for node in graph for value in node.outputs):
        head_from_residual(model, residual)


def _drop_unused(model: ir.Model) -> None:
    """Removes what no output needs, optional inputs included, in place."""
    graph = model.graph
    optional = [value for value in graph.inputs if value.name in graph.initializers]
    common_passes.RemoveUnusedNodesPass()(model)
    for value in optional:
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(str(value.name), None)
            graph.inputs.remove(value)


def with_past(model: ir.Model) -> ir.Model:
    """A copy with a KV cache: inputs ``past_key_values.N.key|value`` [b, heads, past, d_head], outputs ``present.N.*``.

    ``attention_mask`` [b, past + s] and ``position_ids`` [b, s] are then required. hook_k and hook_v hold the new
    tokens only, scores and pattern have past + s keys. A segment gets the keys and values of its own layers.
    """
    manifest = read_manifest(model)
    model = model.clone()
    graph = model.graph
    values = values_by_name(model)
    head_with_past(model, values[INPUT_IDS] if INPUT_IDS in values else values[RESIDUAL])
    for layer in range(manifest.config.n_layers):
        if f"blocks.{layer}.attn.hook_k" not in manifest.hooks:
            continue
        for part, letter in (("key", "k"), ("value", "v")):
            name = f"blocks.{layer}.attn.hook_{'rot_k' if letter == 'k' else 'v'}"
            entry = manifest.hooks.get(name) or manifest.hooks[f"blocks.{layer}.attn.hook_{letter}"]
            _remember(graph, values[entry.value], layer, part)
    _drop_unused(model)
    return ensure_hooks_resolve(model, "the graph with past")


def _remember(graph: ir.Graph, new: ir.Value, layer: int, part: str) -> None:
    """Puts the cached tokens before ``new`` [b, s, heads, d_head] for all its readers, in place."""
    assert new.shape is not None
    assert new.producer() is not None
    uses = tuple(new.uses())
    batch, _, heads, size = new.shape
    past = ir.Value(
        name=past_input(layer, part), shape=ir.Shape(["batch", heads, "past_sequence", size]), type=new.type
    )
    graph.inputs.append(past)
    tape = Tape()
    turned = tape.op("Transpose", [new], {"perm": [0, 2, 1, 3]})
    present = tape.op("Concat", [past, turned], {"axis": 2})
    present.name, present.type = present_output(layer, part), new.type
    present.shape = ir.Shape([batch, heads, "total_sequence", size])
    back = tape.op("Transpose", [present], {"perm": [0, 2, 1, 3]})
    for node, index in uses:
        node.replace_input_with(index, back)
    for index, node in enumerate(tape.nodes):
        node.name = f"{present.name}/{node.op_type}_{index}"
        node.outputs[0].name = node.outputs[0].name or f"{present.name}/{node.op_type}_{index}"
    graph.insert_after(new.producer(), list(tape.nodes))  # type: ignore[arg-type]
    graph.outputs.append(present)


def first_layers(model: ir.Model, count: int) -> ir.Model:
    """A copy with only the first ``count`` blocks (1 to n_layers), then the final norm and the unembedding as before.

    Raises InputError for a count that the model has not.
    """
    manifest = read_manifest(model)
    layers = manifest.config.n_layers
    if not 1 <= count <= layers:
        raise InputError(f"first_n_layers={count}: this model has {layers} layers, so it goes from 1 to {layers}.")
    model = model.clone()
    values = values_by_name(model)
    last, new_last = (values[_residual_value(manifest, layer)] for layer in (layers, count))
    model.graph.outputs.clear()
    last.replace_all_uses_with(new_last)
    hooks = {name: entry for name, entry in manifest.hooks.items() if (split_name(name)[0] or 0) < count}
    weights = {
        name: view
        for name, view in manifest.weights.items()
        if not name.startswith("blocks.") or int(name.split(".")[1]) < count
    }
    model.graph.outputs.extend(
        [values[LOGITS], *(values[n] for n in dict.fromkeys(h.value for h in hooks.values()) if n != LOGITS)]
    )
    _drop_unused(model)
    config = replace(manifest.config, n_layers=count)
    write_manifest(model, replace(manifest, config=config, hooks=hooks, weights=weights))
    return ensure_hooks_resolve(model, "the shortened graph")
