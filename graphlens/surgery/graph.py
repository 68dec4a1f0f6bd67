"""A hooked graph in memory: its manifest, its values by name, and the few ways in which surgery changes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.tape import Tape

from graphlens.errors import ModelFileError
from graphlens.file.manifest import METADATA_KEY, Manifest
from graphlens.file.names import AXES
from graphlens.file.written import advice_for, said_of

Attribute = int | float | str | Sequence[int] | ir.Graph
"""What a node's attribute may be given as."""


_parsed: dict[str, Manifest] = {}  # by text: a model and its copies share one, so it is parsed once for all of them
_MOST_PARSED = 32


def _manifest(text: str, where: str) -> Manifest:
    """The manifest that a text holds."""
    if text in _parsed:
        return _parsed[text]
    found = Manifest.from_json(text, where)
    for name, entry in found.hooks.items():
        strange = [axis for axis in entry.axes if axis not in AXES]
        if strange:
            raise ModelFileError(
                f"{where}: the manifest gives {name!r} the axis {strange[0]!r}, which there is not. Export the model again."
            )
    for oldest in list(_parsed)[: 1 - _MOST_PARSED]:
        _parsed.pop(oldest, None)  # another thread may have been here
    _parsed[text] = found
    return found


class NotHooked(ModelFileError):
    """A graph that could be read and has no manifest."""


def read_manifest(model: ir.Model, where: str = "this model") -> Manifest:
    """The manifest of a hooked model.

    Args:
        model: A hooked model.
        where: What an error calls the model: its path, say.

    Returns:
        The manifest.

    Raises:
        NotHooked: (a ModelFileError) The model has no manifest.
        ModelFileError: Its manifest is malformed or of a newer format.
    """
    return manifest_in(model.metadata_props, where, model.producer_name)


def manifest_in(metadata: Mapping[str, str], where: str, producer: str | None = None) -> Manifest:
    """The manifest among a model's metadata; see read_manifest.

    Args:
        metadata: The model's ``metadata_props``.
        where: What an error calls the model: its path, say.
        producer: The model's ``producer_name``.
    """
    text = metadata.get(METADATA_KEY)
    if text is None:
        ours = said_of(metadata, producer)
        if ours is not None:
            raise NotHooked(f"{where}: this is {ours}. {advice_for(metadata, producer)}")
        raise NotHooked(
            f"{where}: no graphlens manifest, so this is not a hooked file. Make one: graphlens export of "
            "a checkpoint, graphlens adopt of an ONNX file that another program wrote."
        )
    found = _manifest(text, where)
    # Mappings of the caller's own: editing one must not reach what the next reader gets.
    return replace(
        found,
        hooks=dict(found.hooks),
        weights=dict(found.weights),
        files=dict(found.files),
        exporter=dict(found.exporter),
    )


def write_manifest(model: ir.Model, manifest: Manifest) -> None:
    """Stores a manifest in a model, in place.

    Args:
        model: The model. A manifest that it has is replaced.
        manifest: What the model is to say about itself.
    """
    model.metadata_props[METADATA_KEY] = manifest.to_json()


def values_by_name(model: ir.Model) -> dict[str, ir.Value]:
    """Every value of the main graph by its name: inputs, initializers and outputs of nodes.

    Args:
        model: A model.

    Returns:
        Name -> value.
    """
    return {str(value.name): value for value in _values(model.graph)}


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def ensure_hooks_resolve(model: ir.Model, where: str = "the graph") -> ir.Model:
    """The model itself, after a check that each hook point of its manifest names a value of its graph.

    Args:
        model: A hooked model.
        where: What an error calls the graph.

    Returns:
        ``model``.

    Raises:
        ModelFileError: The value of a hook point is not in the graph.
    """
    _check_hooks(model, read_manifest(model), where)
    return model


def finish(model: ir.Model, manifest: Manifest, where: str = "the graph") -> ir.Model:
    """Ends a transformation: stores the manifest that the model has now, in place, and checks that it is true.

    A transformation that drops or renames a value would otherwise leave a hook point that silently never fires.

    Args:
        model: The new model.
        manifest: Its manifest.
        where: What an error calls the graph.

    Returns:
        ``model``.

    Raises:
        ModelFileError: The value of a hook point is not in the graph.
    """
    write_manifest(model, manifest)
    _check_hooks(model, manifest, where)
    return model


def _check_hooks(model: ir.Model, manifest: Manifest, where: str) -> None:
    names = values_by_name(model).keys()
    lost = [name for name, entry in manifest.hooks.items() if entry.value not in names]
    if lost:
        raise ModelFileError(f"{where} lost {len(lost)} hook points, {lost[0]!r} first: their values are gone.")


# Adding to a graph


def integers(tape: Tape, numbers: int | Iterable[int], name: str) -> ir.Value:
    """An int64 constant on a tape.

    Args:
        tape: Takes the constant.
        numbers: One number (a scalar), or several (one axis).
        name: The constant's name.

    Returns:
        The constant.
    """
    array = np.asarray(numbers if isinstance(numbers, int) else list(numbers), np.int64)
    return tape.initializer(ir.tensor(array), name=name)


def optional_input(graph: ir.Graph, name: str, default: npt.ArrayLike, shape: Sequence[str | int]) -> ir.Value:
    """Adds an input that a run may leave out: an initializer that is also an input.

    Args:
        graph: Changed in place.
        name: The input's name.
        default: Its value where a run does not feed it.
        shape: Its shape; symbolic where a run may feed a larger array than the default.

    Returns:
        The input.
    """
    tensor = ir.tensor(default, name=name)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.inputs.append(value)
    graph.initializers[name] = value
    return value


NodeName = Callable[[ir.Node, int], str]
"""The name of a new node, from the node and its place on its tape."""


def named(name: str) -> NodeName:
    """Names the one node of a tape.

    Args:
        name: The node's name.

    Returns:
        A function for ``install``.
    """
    return lambda node, index: name


def numbered(prefix: str, joint: str = "_") -> NodeName:
    """Names nodes ``{prefix}{operator}{joint}{place}``.

    Args:
        prefix: What all names begin with.
        joint: What joins the operator and the place.

    Returns:
        A function for ``install``.
    """
    return lambda node, index: f"{prefix}{node.op_type}{joint}{index}"


def install(
    graph: ir.Graph,
    tape: Tape,
    node_name: NodeName,
    output_name: NodeName = lambda node, index: str(node.name),
    after: ir.Value | None = None,
) -> None:
    """Puts the nodes and constants of a tape into a graph.

    Args:
        graph: Changed in place.
        tape: New nodes, in an order in which they can run, and constants that have names.
        node_name: Names each node.
        output_name: Names those outputs of a node that have no name, from the named node and the output's place.
        after: The nodes follow the one that computes this value; where none does (an input or initializer), they come
            before all others. None: they come last.
    """
    for initializer in tape.initializers:
        graph.initializers[str(initializer.name)] = initializer
    for index, node in enumerate(tape.nodes):
        node.name = node_name(node, index)
        for place, output in enumerate(node.outputs):
            output.name = output.name or output_name(node, place)
    producer = None if after is None else after.producer()
    if producer is not None:
        graph.insert_after(producer, tape.nodes)
    elif after is not None:
        graph.insert_before(graph[0], tape.nodes)
    else:
        graph.extend(tape.nodes)


# Changing what is there


Readers = Sequence[tuple[ir.Node, int]]
"""Nodes that read a value, each with the place of the value among its inputs."""


def let_read(readers: Readers, new: ir.Value, old: ir.Value) -> None:
    """Lets readers of one value read another. That one gets the first one's shape and type, unless it has its own.

    Args:
        readers: Who reads ``new`` from now on.
        new: The value to read.
        old: The value that they read until now.
    """
    new.shape = new.shape if new.shape is not None else old.shape
    new.type = new.type if new.type is not None else old.type
    for node, index in readers:
        node.replace_input_with(index, new)


def replace_value(old: ir.Value, new: ir.Value, readers: Readers | None = None, left: str | None = None) -> None:
    """Puts one value in the place of another: it takes over the name, the readers and the place among the outputs.

    It gets the other's shape and type too, unless it has its own.

    Args:
        old: A value of a graph.
        new: Takes its place.
        readers: Who reads ``new`` from now on; all readers of ``old`` by default.
        left: What ``old`` is called from now on; its name with ``/replaced`` by default.
    """
    let_read(tuple(old.uses()) if readers is None else readers, new, old)
    if old.is_graph_output():
        assert old.graph is not None
        outputs = old.graph.outputs
        for index, output in enumerate(outputs):
            if output is old:
                outputs[index] = new
    name = old.name
    old.name, new.name = left or f"{name}/replaced", name


def set_outputs(graph: ir.Graph, values: Iterable[ir.Value]) -> None:
    """Makes these values the outputs of a graph, in their order, and no others.

    Args:
        graph: Changed in place.
        values: Values of the graph.
    """
    outputs = list(values)
    graph.outputs.clear()
    graph.outputs.extend(outputs)


def drop_unused(model: ir.Model) -> None:
    """Removes what no output needs, in place: nodes, initializers and optional inputs, but no required input.

    Args:
        model: A model.
    """
    graph = model.graph
    optional = [value for value in graph.inputs if value.name in graph.initializers]
    common_passes.RemoveUnusedNodesPass()(model)
    for value in optional:
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(str(value.name), None)
            graph.inputs.remove(value)
