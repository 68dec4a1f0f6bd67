"""Which part of a model a graph holds: from a block's residual on, up to a block's residual, with past keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir
from onnx_ir.tape import Tape

from graphlens.errors import InputError, checked_number
from graphlens.file.io_names import (
    BODY_INPUTS,
    INPUT_IDS,
    KEY_AND_VALUE,
    LOGITS,
    RESIDUAL_IN,
    RESIDUAL_OUT,
    past_input,
    present_output,
)
from graphlens.file.manifest import HookEntry, Manifest
from graphlens.file.names import BEFORE_BLOCKS, in_block, split_name
from graphlens.surgery.adopted.past import with_own_past
from graphlens.surgery.graph import (
    drop_unused,
    ensure_hooks_resolve,
    finish,
    install,
    let_read,
    named,
    numbered,
    read_manifest,
    set_outputs,
    values_by_name,
)
from graphlens.surgery.inputs import head_from_residual, head_with_past
from graphlens.surgery.sae_splicing import carried_on
from graphlens.surgery.token_sizes import TokenSizes, take_sizes_of


def segment(model: ir.Model, start: int | None = None, stop: int | None = None) -> ir.Model:
    """A copy that holds only some blocks: what is skipped is not there.

    The hook map keeps the hook points in between.

    Args:
        model: A hooked model.
        start: The first block, 0 to n_layers. The graph then reads ``residual`` [b, s, d_model] instead of
            ``input_ids``.
        stop: The block after the last, 0 to n_layers. The graph then returns ``residual_out``, the residual stream
            [b, s, d_model] before that block, instead of ``logits``.

    Returns:
        The copy.

    Raises:
        InputError: The model does not have these layers, or ``start`` comes after ``stop``.
    """
    manifest = read_manifest(model)
    layers = manifest.config.n_layers
    for what, layer in (("start", start), ("stop", stop)):
        if layer is not None and not 0 <= checked_number(layer, what) <= layers:
            raise InputError(f"{what} at layer {layer}: this model has {layers} layers, so it goes from 0 to {layers}.")
    if start is not None and stop is not None and start > stop:
        raise InputError(f"start at layer {start} comes after stop at layer {stop}: there is nothing to run.")
    model = model.clone()
    values = values_by_name(model)
    hooks = {name: entry for name, entry in manifest.hooks.items() if _inside(name, layers, start, stop)}
    if stop is not None:
        end = _stop_at(model.graph, values[_residual_value(manifest, stop)])
    else:
        end = values[LOGITS]
    if start is not None and manifest.adopted is None:
        residual = _start_at(model, values[_residual_value(manifest, start)], hooks, start, layers)
        _forget_tokens(model.graph)
        if any(value.name in BODY_INPUTS for node in model.graph for value in node.outputs):
            head_from_residual(model, residual)
    elif start is not None:  # its masks and positions are computed wherever its original does so
        sizes = TokenSizes(model)
        residual = _start_at(model, values[_residual_value(manifest, start)], hooks, start, layers)
        now = values_by_name(model)
        take_sizes_of(model, residual, sizes, [end, *(now[entry.value] for entry in hooks.values())])
        _forget_tokens(model.graph)
    _return(model, end, hooks)
    if start and manifest.adopted is not None:
        _take_past_of(model.graph, start)
    return finish(model, manifest.with_hooks(hooks), "the segment")


def _inside(name: str, layers: int, start: int | None, stop: int | None) -> bool:
    """Whether a hook point lies in a segment."""
    layer, rest = split_name(name)
    if layer is not None:
        return (start or 0) <= layer < (layers if stop is None else stop)
    return start is None if rest in BEFORE_BLOCKS else stop is None


def _residual_value(manifest: Manifest, layer: int) -> str:
    """The value of the residual stream before block ``layer``, before that block's own hook."""
    end = "hook_normalized_resid_post" if manifest.config.normalises_residual else "hook_resid_post"
    name = in_block(0, "hook_resid_pre") if layer == 0 else in_block(layer - 1, end)
    if name not in manifest.hooks:
        raise InputError(
            f"{manifest.config.model_name} has no hook point {name!r}, so it cannot start or stop at layer {layer}."
        )
    return carried_on(manifest.hooks, name)


def _stop_at(graph: ir.Graph, residual: ir.Value) -> ir.Value:
    """Adds the output of a segment that ends with a residual."""
    tape = Tape()
    out = tape.op("Identity", [residual])
    out.name, out.shape, out.type = RESIDUAL_OUT, residual.shape, residual.type
    install(graph, tape, named(RESIDUAL_OUT))
    return out


def _start_at(model: ir.Model, old: ir.Value, hooks: dict[str, HookEntry], start: int, layers: int) -> ir.Value:
    """Lets the readers of ``old`` read a new input, in place; a hook point there moves with them. Returns the input."""
    graph = model.graph
    readers = tuple(old.uses())
    residual = ir.Value(name=RESIDUAL_IN, shape=old.shape, type=old.type)
    name, before = in_block(start, "hook_resid_pre"), old.name
    tape = Tape()
    entered = tape.op("Identity", [residual])
    # Where the hook point before the block has a value of its own, which reads this one, it stays where it is.
    own = name in hooks and hooks[name].value != before and name in values_by_name(model)
    entered.name = name if start < layers and not own else f"{RESIDUAL_IN}/entered"
    if old.name == entered.name:
        old.name = f"{old.name}/skipped"
    let_read(readers, entered, old)
    install(graph, tape, named(f"{RESIDUAL_IN}/start"), after=residual)
    graph.inputs.insert(0, residual)
    for hook, entry in hooks.items():
        if (
            hook == name and not own
        ) or entry.value == before:  # that of what the unembedding reads, where no norm is before it
            hooks[hook] = replace(entry, value=str(entered.name))
    return residual


def _take_past_of(graph: ir.Graph, start: int) -> None:
    """Lets an adopted graph read how many earlier tokens there are off the keys and values of its first block.

    The original reads it off block 0, whose keys and values a segment is not fed.
    """
    inputs = {str(value.name): value for value in graph.inputs}
    for part in KEY_AND_VALUE:
        own = inputs.get(past_input(start, part))
        for layer in range(start):
            skipped = inputs.get(past_input(layer, part))
            if own is not None and skipped is not None:
                skipped.replace_all_uses_with(own)
                graph.inputs.remove(skipped)
                graph.initializers.pop(str(skipped.name), None)


def _forget_tokens(graph: ir.Graph) -> None:
    """Takes the tokens from a graph's inputs."""
    for value in [value for value in graph.inputs if value.name == INPUT_IDS]:
        graph.inputs.remove(value)


def _return(model: ir.Model, end: ir.Value, hooks: Mapping[str, HookEntry]) -> None:
    """Lets a graph return ``end`` and the values of hook points, each once, and hold only what they need, in place."""
    values = values_by_name(model)
    carried = dict.fromkeys(entry.value for entry in hooks.values())
    set_outputs(model.graph, [end, *(values[name] for name in carried if name != LOGITS)])
    drop_unused(model)


def with_past(model: ir.Model) -> ir.Model:
    """A copy with a KV cache.

    Inputs ``past_key_values.N.key`` and ``.value`` [b, heads, past, d_head] and outputs ``present.N.key`` and ``.value``
    [b, heads, past + s, d_head] are added. ``attention_mask`` [b, past + s] and ``position_ids`` [b, s] are then
    required. hook_k and hook_v hold the new tokens only, scores and pattern have past + s keys. An adopted model has the KV
    cache of its original: see ``with_own_past``.

    Args:
        model: A hooked model, or a segment of one, which gets the keys and values of its own layers.

    Returns:
        The copy.

    Raises:
        InputError: The model is an encoder, or was adopted from a file without a KV cache.
    """
    manifest = read_manifest(model)
    if manifest.config.is_encoder:
        raise InputError(
            f"{manifest.config.model_name} is an encoder: its tokens attend to later ones, so there are no past keys and values "
            "to keep (with_past)."
        )
    if manifest.adopted is not None:
        return with_own_past(model)
    model = model.clone()
    graph = model.graph
    values = values_by_name(model)
    head_with_past(model, values[INPUT_IDS] if INPUT_IDS in values else values[RESIDUAL_IN])
    for layer in range(manifest.config.n_layers):
        keys, rotated = in_block(layer, "attn.hook_k"), in_block(layer, "attn.hook_rot_k")
        if keys not in manifest.hooks:
            continue
        # Keys are kept as they are compared: rotated, where positions rotate them.
        names = {"key": rotated if rotated in manifest.hooks else keys, "value": in_block(layer, "attn.hook_v")}
        for part, name in names.items():
            _remember(graph, _used(values[carried_on(manifest.hooks, name)]), layer, part)
    drop_unused(model)
    return ensure_hooks_resolve(model, "the graph with past")


def _used(value: ir.Value) -> ir.Value:
    """Keys or values as attention uses them: cut to a range, where an architecture does so (OLMo)."""
    readers = [use.node for use in value.uses()]
    return readers[0].outputs[0] if len(readers) == 1 and readers[0].op_type == "Clip" else value


def _remember(graph: ir.Graph, new: ir.Value, layer: int, part: str) -> None:
    """Puts the cached tokens before ``new`` [b, s, heads, d_head] for all its readers, in place."""
    assert new.shape is not None
    assert new.producer() is not None
    readers = tuple(new.uses())
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
    for node, index in readers:
        node.replace_input_with(index, back)
    install(graph, tape, numbered(f"{present.name}/"), after=new)
    graph.outputs.append(present)


def first_layers(model: ir.Model, count: int) -> ir.Model:
    """A copy with only the first blocks, then the final norm and the unembedding as before.

    Args:
        model: A hooked model.
        count: How many blocks to keep, 1 to n_layers.

    Returns:
        The copy.

    Raises:
        InputError: The model does not have so many layers.
    """
    manifest = read_manifest(model)
    layers = manifest.config.n_layers
    if not 1 <= checked_number(count, "first_n_layers") <= layers:
        raise InputError(f"first_n_layers={count}: this model has {layers} layers, so it goes from 1 to {layers}.")
    model = model.clone()
    values = values_by_name(model)
    last, new_last = (values[_residual_value(manifest, layer)] for layer in (layers, count))
    model.graph.outputs.clear()
    last.replace_all_uses_with(new_last)
    hooks = {name: entry for name, entry in manifest.hooks.items() if (split_name(name)[0] or 0) < count}
    for name, entry in hooks.items():
        if entry.value == last.name:  # what the unembedding reads, where no norm is before it
            hooks[name] = replace(entry, value=str(new_last.name))
    weights = {name: view for name, view in manifest.weights.items() if (split_name(name)[0] or 0) < count}
    _return(model, values[LOGITS], hooks)
    config = replace(manifest.config, n_layers=count)
    return finish(model, replace(manifest, config=config, hooks=hooks, weights=weights), "the shortened graph")
