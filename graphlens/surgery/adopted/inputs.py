"""The inputs and outputs of a graph that another program exported, made those of a hooked file.

``input_ids`` stays required. The mask, positions, types of tokens and past keys and values get defaults, which the first
nodes compute from it, so that a run may leave them out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from graphlens.errors import ModelFileError
from graphlens.file.io_names import (
    ATTENTION_MASK,
    BODY_INPUTS,
    INPUT_IDS,
    LOGITS,
    PART_INPUTS,
    PIXELS,
    POSITION_IDS,
    PRESENT,
    RESIDUAL_IN,
    RESIDUAL_OUT,
    TOKEN_TYPE_IDS,
    past_input,
    present_output,
)
from graphlens.surgery.adopted.hooks import Seen
from graphlens.surgery.graph import Attribute, install, integers, numbered, optional_input, set_outputs
from graphlens.surgery.match.records import Ports

_PREFIX = "adopted/inputs/"
_PAST = past_input("", "").partition(".")[0] + "."
# What hooked files and the parts of them call their inputs and outputs.
_MEANT = (
    *(INPUT_IDS, PIXELS, ATTENTION_MASK, POSITION_IDS, TOKEN_TYPE_IDS, LOGITS, RESIDUAL_IN, RESIDUAL_OUT),
    *BODY_INPUTS,
    *(name for names in PART_INPUTS.values() for name in names),
)


class _Entry:
    """The first nodes of the graph under construction."""

    def __init__(self, graph: ir.Graph, values: Mapping[str, ir.Value]) -> None:
        self.graph, self.tape, self._values = graph, Tape(), values

    def op(self, kind: str, inputs: Sequence[ir.Value], **attributes: Attribute) -> ir.Value:
        """The output of a new node."""
        return self.tape.op(kind, inputs, attributes)

    def constant(self, numbers: int | list[int], name: str) -> ir.Value:
        """An int64 constant."""
        return integers(self.tape, numbers, f"{_PREFIX}{name}")

    def take(self, name: str) -> ir.Value:
        """An input of the original, which is one no more: what reads it is to read something else."""
        value = self._values[name]
        self.graph.inputs.remove(value)
        self.graph.initializers.pop(str(value.name), None)
        return value

    def feed(self, old: ir.Value, new: ir.Value) -> None:
        """Lets what reads an input of the original read a new value, in the type that it had."""
        if old.dtype is not None and old.dtype != new.dtype:
            cast = self.op("Cast", [new], to=old.dtype)
            cast.type = ir.TensorType(old.dtype)
            new = cast
        new.shape = new.shape if new.shape is not None else old.shape
        made = set(self.tape.nodes)
        for node, index in tuple(old.uses()):
            if node not in made:
                node.replace_input_with(index, new)


def free_names(graph: ir.Graph, reserved: Iterable[str]) -> None:
    """Renames the values of a graph that have names which mean something else in a hooked file, in place.

    Args:
        graph: The graph.
        reserved: Names of hook points. Those of inputs and outputs of hooked files are taken besides.
    """
    taken = {*reserved, *_MEANT}
    for value in (*graph.inputs, *list(graph.initializers.values()), *(out for node in graph for out in node.outputs)):
        name = str(value.name)
        if name in taken or name.startswith((_PREFIX, PRESENT, _PAST)):
            if name in graph.initializers:
                del graph.initializers[name]
                value.name = f"original/{name}"
                graph.initializers[value.name] = value
            else:
                value.name = f"original/{name}"


def ensure_ports_fit(model: ir.Model, ports: Ports, where: str) -> None:
    """Refuses a graph with an input that no run of ours would feed, or of another kind than its place in the model.

    Args:
        model: The graph.
        ports: What its inputs and outputs are.
        where: The file's name, for errors.

    Raises:
        ModelFileError: An input must be fed and is none that matching knows; it is named.
    """
    known = {ports.input, ports.attention_mask, ports.position_ids, ports.token_type_ids, *ports.past.values()}
    for value in model.graph.inputs:
        if value.name not in known and value.name not in model.graph.initializers:
            raise ModelFileError(
                f"{where}: its input {value.name!r} ({value.type} {value.shape}) is none that a transformer of one kind "
                "needs, so graphlens cannot say what to feed it. graphlens expose adds values of any graph as outputs."
            )
    if ports.past and len(ports.past) != len(ports.present):
        raise ModelFileError(
            f"{where}: it takes {len(ports.past)} past keys and values and gives {len(ports.present)} back, so it cannot be "
            "stepped. graphlens expose adds values of any graph as outputs."
        )


def open_ports(model: ir.Model, ports: Ports, values: Mapping[str, ir.Value], seen: Mapping[str, Seen]) -> None:
    """Gives a graph the inputs and outputs of a hooked file, in place.

    Inputs: ``input_ids`` int64 [b, s]; as far as the original has them ``attention_mask`` int64 [b, past + s] (default: ones),
    ``position_ids`` int64 [b, s] (default, also for negative entries: max(cumsum(attention_mask) - 1, 0)),
    ``token_type_ids`` int64 [b, s] (default: zeros) and ``past_key_values.L.key`` and ``.value`` [b, heads, past, d_head]
    (default: none). Of a vision model there is ``pixel_values`` float32 [b, channels, height, width] alone.

    Outputs: ``logits``, and ``present.L.key`` and ``.value`` where there are past ones.

    Args:
        model: The graph.
        ports: What its inputs and outputs are.
        values: The graph's values by the names that ``ports`` has.
        seen: What a probe run saw of the inputs.
    """
    graph, entry = model.graph, _Entry(model.graph, values)
    old = entry.take(ports.input)
    if len(seen[ports.input].shape) == 4:
        _pixels(entry, old, seen[ports.input].shape[1:])
        _outputs(graph, ports, values)
        return
    tokens = ir.Value(name=INPUT_IDS, shape=ir.Shape(["batch", "sequence"]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.insert(0, tokens)
    entry.feed(old, tokens)
    shape = entry.op("Shape", [tokens])
    batch = entry.op("Shape", [tokens], start=0, end=1)
    past = _past(entry, ports, batch, seen)
    whole, total = shape, None
    if past is not None:
        total = entry.op("Add", [past, entry.op("Shape", [tokens], start=1, end=2)])
        whole = entry.op("Concat", [batch, total], axis=0)
    mask = _mask(entry, ports, whole)
    _positions(entry, ports, mask, whole, past, total)
    _types(entry, ports, shape)
    install(graph, entry.tape, numbered(_PREFIX), after=tokens)
    _outputs(graph, ports, values)


def _pixels(entry: _Entry, old: ir.Value, sizes: Sequence[int]) -> None:
    """Makes the images of a vision model an input of that name, float32 [b, channels, height, width]."""
    pixels = ir.Value(name=PIXELS, shape=ir.Shape(["batch", *sizes]), type=ir.TensorType(ir.DataType.FLOAT))
    entry.graph.inputs.insert(0, pixels)
    entry.feed(old, pixels)
    install(entry.graph, entry.tape, numbered(_PREFIX), after=pixels)


def _past(entry: _Entry, ports: Ports, batch: ir.Value, seen: Mapping[str, Seen]) -> ir.Value | None:
    """Makes past keys and values optional. Returns how many positions they are, int64 [1]; None where there are none."""
    length = None
    for (layer, part), name in sorted(ports.past.items()):
        old = entry.take(name)
        heads, size = (seen[name].shape[axis] for axis in (1, 3))
        dtype = old.dtype or ir.DataType.FLOAT
        new = optional_input(
            entry.graph,
            past_input(layer, part),
            np.zeros((1, heads, 0, size), dtype.numpy()),
            ["past_batch", heads, "past_sequence", size],
        )
        if length is None:
            length = entry.op("Shape", [new], start=2, end=3)
        ones = entry.constant([1, 1, 1], f"past.{layer}.{part}")
        full = entry.op("Expand", [new, entry.op("Concat", [batch, ones], axis=0)])
        full.type = ir.TensorType(dtype)
        entry.feed(old, full)
    return length


def _mask(entry: _Entry, ports: Ports, whole: ir.Value) -> ir.Value | None:
    """Makes the mask optional. Returns it in full, int64 [b, past + s]; None where the original takes none."""
    if ports.attention_mask is None:
        return None
    old = entry.take(ports.attention_mask)
    mask = optional_input(entry.graph, ATTENTION_MASK, np.ones((1, 1), np.int64), ["mask_batch", "mask_sequence"])
    full = entry.op("Expand", [mask, whole])
    full.type = ir.TensorType(ir.DataType.INT64)
    entry.feed(old, full)
    return full


def _positions(
    entry: _Entry,
    ports: Ports,
    mask: ir.Value | None,
    whole: ir.Value,
    past: ir.Value | None,
    total: ir.Value | None,
) -> None:
    """Makes positions optional: by default they count the real tokens."""
    if ports.position_ids is None:
        return
    old = entry.take(ports.position_ids)
    given = optional_input(
        entry.graph, POSITION_IDS, np.full((1, 1), -1, np.int64), ["position_batch", "position_sequence"]
    )
    unit, zero = entry.constant(1, "unit"), entry.constant(0, "nothing")
    full = entry.op("Expand", [unit, whole]) if mask is None else mask
    counted = entry.op("Max", [entry.op("Sub", [entry.op("CumSum", [full, unit]), unit]), zero])
    if past is not None and total is not None:
        counted = entry.op("Slice", [counted, past, total, entry.constant([1], "sequence_axis")])
    positions = entry.op("Where", [entry.op("Less", [given, zero]), counted, given])
    positions.type = ir.TensorType(ir.DataType.INT64)
    entry.feed(old, positions)


def _types(entry: _Entry, ports: Ports, shape: ir.Value) -> None:
    """Makes types of tokens optional: by default all are of type 0."""
    if ports.token_type_ids is None:
        return
    old = entry.take(ports.token_type_ids)
    types = optional_input(entry.graph, TOKEN_TYPE_IDS, np.zeros((1, 1), np.int64), ["types_batch", "types_sequence"])
    full = entry.op("Expand", [types, shape])
    full.type = ir.TensorType(ir.DataType.INT64)
    entry.feed(old, full)


def _outputs(graph: ir.Graph, ports: Ports, values: Mapping[str, ir.Value]) -> None:
    """Names the outputs, and leaves out what no run of ours reads."""
    result = ports.logits or ports.hidden
    assert result is not None, "it was looked for"
    wanted = {LOGITS: values[result]}  # hidden states too: whoever asks for logits is refused (Manifest.headless)
    for (layer, part), name in sorted(ports.present.items()):
        wanted[present_output(layer, part)] = values[name]
    for name, value in wanted.items():
        value.name = name
    set_outputs(graph, wanted.values())
