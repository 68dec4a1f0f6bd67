"""Blocks that compute the same are traced twice, and copied in the graph: tracing takes most of an export's time and memory.

The copy is what tracing would give: its nodes are those of a traced block, over the weights of its own layer. What a traced
block shares with the other one, its copies share too (rotary cosines and sines, sizes, constants).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import onnx_ir as ir

from graphlens.errors import ExportError
from graphlens.export.decoder import MODEL_PREFIX
from graphlens.export.families import Spec
from graphlens.export.operations import HOOK_DOMAIN, HOOK_OP
from graphlens.file.names import block_name, in_block


def _kind(spec: Spec, layer: int) -> Hashable:
    """What tells a block from others besides its weights."""
    a = spec.attention
    rotary = None if a.rotary is None else (a.rotary.types[layer] if a.rotary.types else "", layer in a.rotary.skipped)
    return layer in a.local, rotary, layer if a.by_layer else None


def traced_layers(spec: Spec) -> tuple[int, ...]:
    """The blocks that have to be traced: the first two of each kind, since the first computes what all of the kind share.

    Args:
        spec: What the model computes.
    """
    found: dict[Hashable, list[int]] = {}
    for layer in range(spec.n_layers):
        found.setdefault(_kind(spec, layer), []).append(layer)
    return tuple(sorted(layer for layers in found.values() for layer in layers[:2]))


def repeat_blocks(model: ir.Model, spec: Spec) -> None:
    """Puts the blocks into a graph, in place, that were not traced.

    Args:
        model: A traced and optimised graph of the blocks of ``traced_layers``, its hook points still marked.
        spec: What the model computes.

    Raises:
        ExportError: A block shares with others what it computes from the residual stream or its own weights.
    """
    graph, traced = model.graph, traced_layers(spec)
    if len(traced) == spec.n_layers:
        return
    ends = "hook_normalized_resid_post" if spec.residual_norms or spec.encoder is not None else "hook_resid_post"
    marks = {
        node.attributes["name"].as_string(): node
        for node in graph
        if node.op_type == HOOK_OP and node.domain == HOOK_DOMAIN
    }
    last = marks[in_block(traced[-1], ends)].outputs[0]
    after = [(node, index) for node, index in last.uses()]
    samples = {_kind(spec, layer): layer for layer in traced}  # the second of each kind, where there are two
    blocks = {
        layer: _Block(graph, spec, layer, marks[in_block(layer, "hook_resid_pre")], marks[in_block(layer, ends)])
        for layer in samples.values()
    }
    residual, place = marks[in_block(0, "hook_resid_pre")].inputs[0], marks[in_block(0, ends)]
    assert residual is not None
    for layer in range(spec.n_layers):
        if layer in traced:
            marks[in_block(layer, "hook_resid_pre")].replace_input_with(0, residual)
            place = marks[in_block(layer, ends)]
        else:
            nodes = blocks[samples[_kind(spec, layer)]].copied(layer, residual)
            graph.insert_after(place, nodes)
            place = nodes[-1]
        residual = place.outputs[0]
    for node, index in after:
        node.replace_input_with(index, residual)


class _Block:
    """A traced block that is copied.

    Args:
        graph: The graph.
        spec: What the model computes.
        layer: The block.
        first: The marker of its hook_resid_pre.
        last: The marker of the hook point that it ends with.
    """

    def __init__(self, graph: ir.Graph, spec: Spec, layer: int, first: ir.Node, last: ir.Node) -> None:
        self._graph, self._spec, self._layer = graph, spec, layer
        self._first, self._last = first, last
        self._names = (f"{spec.blocks}.{layer}.", f"{MODEL_PREFIX}{spec.blocks}.{layer}.")
        own = self._own()
        self._nodes = [node for node in graph if node in own]
        read = [
            value for node in self._nodes for value in node.inputs if value is not None and value.producer() is None
        ]
        # In the order in which they are read, so that the same checkpoint gives the same bytes.
        self._weights = [value for value in dict.fromkeys(read) if self._is_own(value, own)]

    def _own(self) -> set[ir.Node]:
        """The nodes that are the block's alone: what it computes from the residual stream, from its weights, or for itself."""
        reached, waiting = {self._first}, [self._last]
        while waiting:
            node = waiting.pop()
            if node in reached:
                continue
            reached.add(node)
            waiting += [producer for value in node.inputs if value is not None and (producer := value.producer())]
        own = set[ir.Node]()
        for node in self._graph:  # sorted, so that what a node reads was looked at before
            if node in reached and (node is self._first or any(self._is_from(value, own) for value in node.inputs)):
                own.add(node)
        for node in reversed(list(self._graph)):
            if node in reached and all(reader in own for output in node.outputs for reader, _ in output.uses()):
                own.add(node)
        for node in own - {self._last}:
            if any(output.is_graph_output() for output in node.outputs) or any(
                reader not in own for output in node.outputs for reader, _ in output.uses()
            ):
                raise ExportError(
                    f"internal error: {node.op_type} of {block_name(self._layer)} is read outside of the block."
                )
        return own

    def _is_from(self, value: ir.Value | None, own: set[ir.Node]) -> bool:
        """True for a weight of the block, and for what an own node gives."""
        if value is None:
            return False
        producer = value.producer()
        return str(value.name).startswith(self._names) if producer is None else producer in own

    def _is_own(self, value: ir.Value, own: set[ir.Node]) -> bool:
        """True for an initializer that the block alone reads: each copy has one of its own."""
        if value.is_graph_input():
            return False
        return str(value.name).startswith(self._names) or all(reader in own for reader, _ in value.uses())

    def copied(self, layer: int, residual: ir.Value) -> list[ir.Node]:
        """The nodes of the same block over another layer's weights, which are put into the graph.

        Args:
            layer: The other layer.
            residual: The residual stream before it.
        """
        values: dict[ir.Value, ir.Value] = {}
        for value in self._weights:
            name = self._renamed(str(value.name), layer)
            copy = ir.Value(name=name, shape=value.shape, type=value.type)
            if value.const_value is not None:
                copy.const_value = ir.tensor(value.const_value.numpy(), name=name)
            values[value] = self._graph.initializers[name] = copy
        entered = self._first.inputs[0]
        assert entered is not None
        values[entered] = residual
        return [self._copy(node, layer, values) for node in self._nodes]

    def _copy(self, node: ir.Node, layer: int, values: dict[ir.Value, ir.Value]) -> ir.Node:
        """A copy of a node that reads what ``values`` has in place of its inputs, and adds its outputs to them."""
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else values.get(value, value) for value in node.inputs],
            self._attributes(node.attributes, layer),
            overload=node.overload,
            num_outputs=len(node.outputs),
            version=node.version,
            name=None if node.name is None else f"{node.name}/{layer}",
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.shape, new.type = self._renamed(str(old.name), layer), old.shape, old.type
            values[old] = new
        return copy

    def _attributes(self, attributes: Mapping[str, ir.Attr], layer: int) -> Sequence[ir.Attr]:
        """A node's attributes; a mark of the block becomes that of another layer."""
        block, found = f"{block_name(self._layer)}.", list(attributes.values())
        for place, attribute in enumerate(found):
            if attribute.type == ir.AttributeType.STRING and attribute.as_string().startswith(block):
                name = attribute.as_string().removeprefix(block)
                found[place] = ir.AttrString(attribute.name, in_block(layer, name))
        return found

    def _renamed(self, name: str, layer: int) -> str:
        """The name of a copied value: that of another layer's weight, or its own with the layer behind it."""
        for own in self._names:
            if name.startswith(own):
                return f"{own.removesuffix(f'{self._layer}.')}{layer}.{name.removeprefix(own)}"
        return f"{name}/{layer}"
