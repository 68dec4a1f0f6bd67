"""A hooked graph in memory: its manifest, its values by name, and the promise that every hook point still resolves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir

from graphlens.errors import ModelFileError
from graphlens.file.manifest import METADATA_KEY, Manifest

LOGITS = "logits"
INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"


def read_manifest(model: ir.Model, where: str = "this model") -> Manifest:
    """The manifest of a hooked model. Raises ModelFileError for a model that has none, or one of a newer format."""
    text = model.metadata_props.get(METADATA_KEY)
    if text is None:
        raise ModelFileError(
            f"{where}: no graphlens manifest, so this is not a hooked file. Make one: graphlens export."
        )
    return Manifest.from_json(text, where)


def write_manifest(model: ir.Model, manifest: Manifest) -> None:
    """Stores the manifest in the model, in place."""
    model.metadata_props[METADATA_KEY] = manifest.to_json()


def values_by_name(model: ir.Model) -> dict[str, ir.Value]:
    """Every value of the main graph by its name: inputs, initializers and node outputs."""
    return {str(value.name): value for value in _values(model.graph)}


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def ensure_hooks_resolve(model: ir.Model, where: str = "the graph") -> ir.Model:
    """The model itself, after checking that each hook of its manifest names a value of its graph.

    Every transformation ends with this: a pass that drops or renames a value would otherwise leave a hook that
    silently never fires. Raises ModelFileError.
    """
    names = values_by_name(model).keys()
    lost = [name for name, entry in read_manifest(model).hooks.items() if entry.value not in names]
    if lost:
        raise ModelFileError(f"{where} lost {len(lost)} hook points, {lost[0]!r} first: their values are gone.")
    return model


def optional_input(graph: ir.Graph, name: str, default: Any, shape: Sequence[str | int]) -> ir.Value:
    """Adds an input that may be left out: an initializer that is also an input.

    ``shape`` is symbolic where a caller may feed a larger array than the default.
    """
    tensor = ir.tensor(default, name=name)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.inputs.append(value)
    graph.initializers[name] = value
    return value
