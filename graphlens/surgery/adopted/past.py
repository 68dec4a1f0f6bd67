"""The KV cache of a graph that another program exported: it has one or it has none, and none can be added."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from graphlens.errors import InputError
from graphlens.file.io_names import PRESENT, past_input
from graphlens.surgery.graph import drop_unused, finish, read_manifest, set_outputs, values_by_name

PAST = "past"
"""What a manifest's list of the original's inputs calls past keys and values."""
LAST_PAST = "past of the last tokens"
"""What it calls them where a layer with a sliding window takes those of its last tokens only."""
_PASTS = {PAST, LAST_PAST}
_PAST_INPUTS = past_input("", "").partition(".")[0] + "."


def takes_past(model: ir.Model) -> bool:
    """True if a graph has inputs for past keys and values.

    Args:
        model: A hooked model.
    """
    return any(str(value.name).startswith(_PAST_INPUTS) for value in model.graph.inputs)


def keeps_a_window(model: ir.Model) -> bool:
    """True if a graph returns the keys and values of some last tokens only, in a layer whose attention reaches no farther.

    Args:
        model: The graph as its exporter wrote it, with its fused operators.
    """
    return any(
        node.op_type == "GroupQueryAttention"
        and "sliding_window_cache" in node.attributes
        and node.attributes["sliding_window_cache"].as_int() == 1
        for node in model.graph
    )


def with_own_past(model: ir.Model) -> ir.Model:
    """A copy of an adopted model that returns the keys and values of all tokens so far, as its original does.

    Args:
        model: An adopted model, or a segment of one.

    Returns:
        The copy. Its inputs are those of the model: past keys and values are optional, as mask and positions are.

    Raises:
        InputError: The original takes no past keys and values.
    """
    manifest = read_manifest(model)
    if not takes_past(model) and manifest.adopted is not None and not _PASTS & {*manifest.adopted.inputs}:
        raise InputError(
            f"{manifest.config.model_name} was adopted from a file that takes no past keys and values "
            f"({manifest.adopted.file}), so it has no KV cache: generate with use_past_kv_cache=False, or adopt an export with "
            "past keys and values."
        )
    model = model.clone()
    returned = {str(value.name) for value in model.graph.outputs}
    for name, value in values_by_name(model).items():
        if name.startswith(PRESENT) and name not in returned:
            model.graph.outputs.append(value)
    return model


def without_past(model: ir.Model) -> ir.Model:
    """A copy of an adopted model that runs whole prompts only: it takes no past keys and values, and returns none.

    Args:
        model: A hooked model; one that takes none is handed back.

    Returns:
        The copy.
    """
    if not takes_past(model):
        return model
    model = model.clone()
    graph, manifest = model.graph, read_manifest(model)
    for value in [value for value in graph.inputs if str(value.name).startswith(_PAST_INPUTS)]:
        graph.inputs.remove(value)  # its default, which is empty, becomes a constant
    set_outputs(graph, [value for value in graph.outputs if not str(value.name).startswith(PRESENT)])
    drop_unused(model)
    if manifest.adopted is not None:
        inputs = tuple(name for name in manifest.adopted.inputs if name not in _PASTS)
        manifest = replace(manifest, adopted=replace(manifest.adopted, inputs=inputs))
    return finish(model, manifest, "the graph without past")
