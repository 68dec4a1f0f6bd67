"""One sublayer of a block alone: attention or the MLP, from what its matrices read to what its last matrix gives."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from graphlens.errors import InputError
from graphlens.file.io_names import (
    ATTENTION,
    BODY_INPUTS,
    MLP,
    PART_INPUTS,
    PRESENT,
    RESIDUAL_IN,
    RESIDUAL_OUT,
    WHOLE_BLOCK,
)
from graphlens.file.manifest import Manifest
from graphlens.file.names import in_block
from graphlens.file.stored import StoredWeights
from graphlens.surgery.graph import (
    drop_unused,
    finish,
    install,
    let_read,
    named,
    read_manifest,
    replace_value,
    set_outputs,
    values_by_name,
)
from graphlens.surgery.structure import Structure, stored_weight
from graphlens.surgery.sublayers import Sublayer, norm_weights, sublayers


def part_alone(model: ir.Model, layer: int, part: str) -> ir.Model:
    """A copy of the segment of one block that holds its attention or its MLP alone, as TransformerLens calls them.

    It begins after the norm before them and ends before a norm after them. Queries, keys and values are computed from inputs
    of their own; in a graph in which every head has an input of its own, these have a head axis.

    Args:
        model: The segment of a hooked model that holds this block, with past keys and values or without.
        layer: The block.
        part: "attn" or "mlp"; "block" for all of it, which the segment is already.

    Returns:
        The copy; of "block" the segment itself. A sublayer takes ``PART_INPUTS[part]``, each [b, s, d_model] or [b, s, heads,
        d_model], and besides ``residual`` [b, s, d_model], of which only the sizes count; it gives ``residual_out``. Its hook
        map has the hook points of the part.

    Raises:
        InputError: The blocks have no such part, or the graph computes it from more than these.
    """
    if part == WHOLE_BLOCK:
        return model
    model = model.clone()
    work = _Part(model, read_manifest(model), layer, part)
    return work.finish(work.cut())


def read_by_mlp(model: ir.Model, layer: int) -> ir.Value:
    """The value that the matrices of a block's MLP read: after its norm, with the norm's weights.

    Args:
        model: A hooked model.
        layer: The block.

    Raises:
        InputError: The block has no MLP, or it reads something else.
    """
    return _Part(model, read_manifest(model), layer, MLP).read()


class _Part:
    """The part of a block, its model being rewritten in place."""

    def __init__(self, model: ir.Model, manifest: Manifest, layer: int, part: str) -> None:
        self._model, self._manifest, self._layer, self._part = model, manifest, layer, part
        self._values, self._structure = values_by_name(model), Structure(model, manifest)
        self._stored = StoredWeights(model, manifest)
        parts = sublayers(manifest.config, layer)
        if part != ATTENTION and len(parts) == 1:
            raise InputError(f"the blocks of {manifest.config.model_name} have no MLP.")
        self._lies: Sublayer = parts[0] if part == ATTENTION else parts[1]

    def read(self) -> ir.Value:
        """What the matrices of the MLP read."""
        return self._read_at("")

    def cut(self) -> ir.Value:
        """Lets the part read inputs of its own. Returns what it gives."""
        end = self._structure.summed(self._lies)
        if end is None:
            raise self._refusal(f"ends at no value that can be found before {self._lies.written!r}")
        if self._part == ATTENTION:
            for name, hook in zip(PART_INPUTS[self._part], self._lies.readers, strict=True):
                self._feed_copy(self._read_at(hook[-1]), self._hook(hook), name)
        else:
            (name,) = PART_INPUTS[self._part]
            value = self._read_at("")
            self._take_sizes_of_residual()
            let_read(tuple(value.uses()), self._input(name, value), value)
        return end

    def _hook(self, name: str) -> ir.Value:
        found = self._structure.value(name)
        if found is None:
            raise self._refusal(f"has no {name!r}")
        return found

    def _read_at(self, letter: str) -> ir.Value:
        """What the matrices of the part read; those of queries, keys or values, by their letter."""
        at, hooks = self._lies, self._manifest.hooks
        start, weights = at.start, [] if at.norm is None else norm_weights(at.norm)
        if letter and at.norm is None:  # copies for each head, where there are some
            copies = [in_block(self._layer, name) for name in (f"hook_{letter}_input", "hook_attn_in")]
            start = next((name for name in copies if name in hooks), start)
        elif letter and f"{start}@{letter}" in hooks:
            start = f"{start}@{letter}"
        value = self._hook(start)
        for name in weights:
            value = value if self._stored.entry(name) is None else self._after(value, name)
        return value

    def _after(self, value: ir.Value, weight: str) -> ir.Value:
        """A value times a norm's weight, or plus its bias, where that is all that reads the value."""
        readers = _readers(value)
        while len(readers) == 1 and readers[0][0].op_type in ("Cast", "Identity"):  # in a graph of another exporter
            readers = _readers(readers[0][0].outputs[0])
        if len(readers) == 1 and readers[0][0].op_type == ("Mul" if weight.endswith(".w") else "Add"):
            ((node, place),) = readers
            other = node.inputs[1 - place]
            found = None if other is None else stored_weight(other)
            dtype, view = np.dtype(self._manifest.config.dtype), self._stored.views[weight]
            if found == (self._stored.initializer(weight), float(np.asarray(view.plus or 0, dtype))):
                return node.outputs[0]
        raise self._refusal(f"reads {value.name!r} otherwise than times and plus the weights of its norm")

    def _input(self, name: str, like: ir.Value) -> ir.Value:
        """A new input of the graph, of the sizes of a value and the model's own type."""
        dtype = ir.DataType.from_numpy(np.dtype(self._manifest.config.dtype))
        found = ir.Value(name=name, shape=like.shape, type=ir.TensorType(dtype))
        self._model.graph.inputs.append(found)
        return found

    def _take_sizes_of_residual(self) -> None:
        """Lets sizes that are read of positions and masks be read of the residual stream, so that no mask is made for them."""
        residual = self._values[RESIDUAL_IN]
        sizes = {str(size): axis for axis, size in enumerate((residual.shape or ())[:2])}
        for node in self._model.graph:
            source = node.inputs[0] if node.op_type == "Shape" else None
            if source is None or source.name not in BODY_INPUTS or not {"start", "end"} <= node.attributes.keys():
                continue
            start, end = (node.attributes[name].as_int() for name in ("start", "end"))
            axis = sizes.get(str(source.shape[start])) if source.shape is not None and end == start + 1 else None
            if axis is not None:
                node.replace_input_with(0, residual)
                node.attributes["start"], node.attributes["end"] = (
                    ir.AttrInt64("start", axis),
                    ir.AttrInt64("end", axis + 1),
                )

    def _feed_copy(self, start: ir.Value, end: ir.Value, name: str) -> None:
        """Lets ``end`` be computed from a new input instead of ``start``, by copies of the nodes between the two."""
        nodes = _between(start, end)
        if end.producer() not in nodes:
            raise self._refusal(f"does not compute {end.name!r} from what its norm gives")
        graph, fed = self._model.graph, self._input(name, start)
        copies: dict[ir.Value, ir.Value] = {start: fed}
        made = []
        for node in (node for node in graph if node in nodes):
            outputs = [ir.Value(name=f"{name}/{o.name}", shape=o.shape, type=o.type) for o in node.outputs]
            inputs = [None if given is None else copies.get(given, given) for given in node.inputs]
            attributes = dict(node.attributes).values()
            made.append(
                ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, name=f"{name}/{node.name}")
            )
            copies.update(zip(node.outputs, outputs, strict=True))
        last = end.producer()
        assert last is not None, "checked above"
        graph.insert_after(last, made)
        replace_value(end, copies[end])

    def finish(self, end: ir.Value) -> ir.Model:
        """The graph that gives ``end`` and the hook points of the part, and holds only what they need."""
        graph = self._model.graph
        tape = Tape()
        for old in graph.outputs:
            if old.name == RESIDUAL_OUT:
                old.name = f"{RESIDUAL_OUT}/block"
        out = tape.op("Identity", [end])
        out.name, out.shape, out.type = RESIDUAL_OUT, end.shape, end.type
        install(graph, tape, named(RESIDUAL_OUT))
        prefix = in_block(self._layer, f"{self._part}.")
        hooks = {name: entry for name, entry in self._manifest.hooks.items() if name.startswith(prefix)}
        values = values_by_name(self._model)
        present = [value for value in graph.outputs if str(value.name).startswith(PRESENT)]
        set_outputs(graph, dict.fromkeys([out, *(values[entry.value] for entry in hooks.values()), *present]))
        drop_unused(self._model)
        graph.sort()
        self._ensure_alone(graph)
        return finish(self._model, self._manifest.with_hooks(hooks), f"{prefix[:-1]} alone")

    def _ensure_alone(self, graph: ir.Graph) -> None:
        """Refuses a part that something else of the residual stream reaches than its sizes."""
        waiting = [value for value in graph.inputs if value.name == RESIDUAL_IN]
        seen = set(waiting)
        ends = set(graph.outputs)
        while waiting:
            value = waiting.pop()
            if value in ends:
                raise self._refusal("is computed from more of the residual stream than its norm gives")
            found = {o for node, _ in value.uses() if node.op_type != "Shape" for o in node.outputs} - seen
            seen |= found
            waiting += found

    def _refusal(self, what: str) -> InputError:
        """The error for a part that cannot be taken out."""
        return InputError(
            f"{in_block(self._layer, self._part)} cannot be called in this model: it {what} (an edit that was baked, a step "
            "without a name). Run the block as a whole, or the model with start_at_layer and stop_at_layer."
        )


def _readers(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """The nodes that read a value, and not only its sizes, each with the place among its inputs."""
    return [(use.node, use.idx) for use in value.uses() if use.node.op_type != "Shape"]


def _between(start: ir.Value, end: ir.Value) -> set[ir.Node]:
    """The nodes that compute one value from another, those apart that need nothing of the other."""
    above: dict[ir.Node, list[ir.Node]] = {}
    waiting, last = [end], end.producer()
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if value is start or node is None or node in above:
            continue
        given = [one for one in node.inputs if one is not None]
        above[node] = [maker for one in given if one is not start and (maker := one.producer()) is not None]
        waiting += given
    found = {node for node in above if start in node.inputs}
    below: Mapping[ir.Node, set[ir.Node]] = _turned(above)
    open_ends: Iterable[ir.Node] = set(found)
    while open_ends:
        open_ends = set(itertools.chain.from_iterable(below.get(node, ()) for node in open_ends)) - found
        found |= set(open_ends)
    return found if last in found else set()


def _turned(arrows: Mapping[ir.Node, Iterable[ir.Node]]) -> dict[ir.Node, set[ir.Node]]:
    """Arrows the other way around."""
    found: dict[ir.Node, set[ir.Node]] = {}
    for end, starts in arrows.items():
        for start in starts:
            found.setdefault(start, set()).add(end)
    return found
