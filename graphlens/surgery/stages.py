"""A graph as stages that run one after the other, block by block, with their weights as inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from graphlens.file.names import in_block
from graphlens.surgery.graph import read_manifest, values_by_name
from graphlens.surgery.ranks import fill_in

_BACKWARD = "gradient/"  # what nodes of a backward pass are called: see differentiate
_INLINE = 1024  # bytes of a weight in the graph itself that is fed like those in files, so that blocks stay alike
_RESID_PRE, _RESID_POST = "hook_resid_pre", "hook_resid_post"


@dataclass(frozen=True)
class Stage:
    """A part of a graph that runs by itself.

    Its graph has names of its own, given out in the order of its nodes, so that blocks that compute alike have the same
    bytes, and one session serves them all.

    Attributes:
        graph: The ONNX model.
        inputs: Its own name of an input -> the name in the whole graph, of an input or of what an earlier stage computes.
            One with a default in the whole graph has it here too.
        weights: Its own name of an input -> the initializer of the whole graph that it is fed with.
        outputs: The name in the whole graph -> its own name of that output.
        by_row: Those weights of which only single rows are read.
    """

    graph: bytes
    inputs: Mapping[str, str]
    weights: Mapping[str, str]
    outputs: Mapping[str, str]
    by_row: frozenset[str]


def stages(model: ir.Model) -> list[Stage]:
    """Cuts a graph into stages: what comes before the blocks, each block, what comes after them.

    A backward pass is cut too, from the last block to the first.

    Args:
        model: A hooked graph, or one made of it. It is left as it is.

    Returns:
        The stages in the order in which they run. Together they give every output of the graph.
    """
    plan = _Assigned(model)
    crossing = plan.crossing()
    if any(value.type is None for value in crossing):
        model = model.clone()
        fill_in(model)
        plan = _Assigned(model)
    proto = ir.to_proto(model)
    return [_Cut(plan, proto, number).stage() for number in plan.numbers()]


class _Assigned:
    """Which stage each node of a graph belongs to. Nodes that read nothing but weights belong to each that needs them."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.nodes = list(model.graph)
        self.reads = [list(dict.fromkeys(_read(node))) for node in self.nodes]
        self.makers = {value: place for place, node in enumerate(self.nodes) for value in node.outputs}
        self.fed = set(self.graph.inputs)
        self.static: set[int] = set()
        self.stage: dict[int, int] = {}  # of each node that is not static, by its place
        self._assign(_boundaries(model))
        self.results = set(self.graph.outputs)
        self.last_read: dict[ir.Value, int] = {}
        for place, number in self.stage.items():
            for value in self.reads[place]:
                self.last_read[value] = max(number, self.last_read.get(value, 0))

    def _assign(self, boundaries: set[ir.Value]) -> None:
        ready: dict[ir.Value, int] = dict.fromkeys(self.fed, 0)  # value -> the first stage that may read it
        homes: dict[ir.Value, int] = {}  # weight -> the last stage of the forward pass that reads it
        backward, last = self._backward(), 0
        for place in sorted(range(len(self.nodes)), key=lambda place: place in backward):
            node, reads = self.nodes[place], self.reads[place]
            moving = [value for value in reads if value in ready]
            if not moving and (reads or node.op_type == "Constant"):
                self.static.add(place)
                continue
            number = max((ready[value] for value in moving), default=0)
            weights = [weight for value in reads if value not in ready for weight in self.weights_of(value)]
            if place in backward:
                # The backward pass reads each block's weights once more, in the reverse order.
                number = max([number, *(2 * last - homes[weight] for weight in weights if weight in homes)])
            else:
                last = max(last, number)
                for weight in weights:
                    homes[weight] = max(number, homes.get(weight, 0))
            self.stage[place] = number
            for value in node.outputs:
                ready[value] = number + (value in boundaries)

    def _backward(self) -> set[int]:
        """The nodes of a backward pass, and those that read what these compute."""
        found: set[int] = set()
        values: set[ir.Value] = set()
        for place, node in enumerate(self.nodes):
            if str(node.name).startswith(_BACKWARD) or not values.isdisjoint(self.reads[place]):
                found.add(place)
                values.update(node.outputs)
        return found

    def weights_of(self, value: ir.Value) -> Iterator[ir.Value]:
        """The initializers that a value which depends on no input is computed from."""
        stack = [value]
        while stack:
            at = stack.pop()
            if at in self.makers:
                stack.extend(self.reads[self.makers[at]])
            elif is_weight(at):
                yield at

    def numbers(self) -> list[int]:
        """The stages that have a node, in order."""
        return sorted(set(self.stage.values()))

    def places(self, number: int) -> list[int]:
        """The nodes of a stage, in order, with those that read nothing but weights."""
        mine = [place for place, stage in self.stage.items() if stage == number]
        # An output that depends on no input is the first stage's.
        loose = [self.makers[value] for value in self.results if self.makers.get(value) in self.static]
        stack = [*mine, *(loose if number == min(self.numbers()) else [])]
        found = set(stack)
        while stack:
            for value in self.reads[stack.pop()]:
                place = self.makers.get(value)
                if place in self.static and place not in found:
                    found.add(place)
                    stack.append(place)
        return sorted(found)

    def crossing(self) -> list[ir.Value]:
        """The values that one stage computes and a later one reads."""
        return [
            value for value, last in self.last_read.items() if self.stage.get(self.makers.get(value, -1), last) < last
        ]


def is_weight(value: ir.Value) -> bool:
    """True for an initializer that is fed to the stages which read it; False for one that lies in their graphs.

    Args:
        value: A value of the whole graph.
    """
    if not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return False
    return isinstance(value.const_value, ir.ExternalTensor) or value.const_value.nbytes > _INLINE


def _boundaries(model: ir.Model) -> set[ir.Value]:
    """The residual streams between blocks."""
    manifest, values = read_manifest(model), values_by_name(model)
    layers = manifest.config.n_layers
    names = [*(in_block(layer, _RESID_PRE) for layer in range(layers)), in_block(layers - 1, _RESID_POST)]
    return {values[manifest.hooks[name].value] for name in names if name in manifest.hooks}


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, its subgraphs included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from _captured(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                yield from _captured(graph)


def _captured(graph: ir.Graph) -> Iterator[ir.Value]:
    """What a subgraph reads from outside."""
    own = {*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)}
    for node in graph:
        yield from (value for value in _read(node) if value not in own)
    yield from (value for value in graph.outputs if value not in own)


@dataclass
class _Cut:
    """One stage in the making."""

    plan: _Assigned
    proto: onnx.ModelProto
    number: int
    names: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, str] = field(default_factory=dict)

    def stage(self) -> Stage:
        """The stage."""
        plan, places = self.plan, self.plan.places(self.number)
        made = {value for place in places for value in plan.nodes[place].outputs}
        read = dict.fromkeys(value for place in places for value in plan.reads[place] if value not in made)
        given = {str(value.name): value for value in read}
        proto = onnx.ModelProto(ir_version=self.proto.ir_version)
        proto.opset_import.extend(self.proto.opset_import)
        proto.functions.extend(self.proto.functions)
        proto.graph.name = "stage"
        stored = {item.name: item for item in self.proto.graph.initializer}
        inputs: dict[str, str] = {}
        weights: dict[str, str] = {}
        for name, value in given.items():
            mine = self.named(name)
            if is_weight(value):
                weights[mine] = name
            elif name in stored:
                item = proto.graph.initializer.add()
                item.CopyFrom(stored[name])
                item.name, item.doc_string = mine, ""
            if is_weight(value) or not value.is_initializer() or value.is_graph_input():
                proto.graph.input.append(self.declared(mine, value))
                if mine not in weights:
                    inputs[mine] = name
        for place in places:
            proto.graph.node.append(self.renamed(self.proto.graph.node[place]))
        outputs = {}
        for place in places:
            for value in plan.nodes[place].outputs:
                loose = place in plan.static and value in plan.results
                if loose or (place not in plan.static and self.leaves(value)):
                    outputs[str(value.name)] = mine = self.named(str(value.name))
                    proto.graph.output.append(self.declared(mine, value, sized=False))
        by_row = frozenset(mine for mine, name in weights.items() if self.is_read_by_row(given[name], places))
        return Stage(proto.SerializeToString(deterministic=True), inputs, weights, outputs, by_row)

    def leaves(self, value: ir.Value) -> bool:
        """True for a value that is an output of the whole graph, or that a later stage reads."""
        return value in self.plan.results or self.plan.last_read.get(value, -1) > self.number

    def is_read_by_row(self, weight: ir.Value, places: Sequence[int]) -> bool:
        """True for a weight of which only rows are gathered."""
        readers = [self.plan.nodes[place] for place in places if weight in self.plan.reads[place]]
        return all(
            node.op_type == "Gather" and node.inputs[0] is weight and node.attributes.get_int("axis", 0) == 0
            for node in readers
        )

    def named(self, name: str) -> str:
        """The stage's own name of a value."""
        return self.names.setdefault(name, f"v{len(self.names)}") if name else ""

    def declared(self, name: str, value: ir.Value, sized: bool = True) -> onnx.ValueInfoProto:
        """An input or output, with sizes named after where they come first."""
        found = onnx.ValueInfoProto(name=name)
        if value.dtype is None:
            return found
        found.type.tensor_type.elem_type = int(value.dtype)
        if sized and value.shape is not None:
            found.type.tensor_type.shape.SetInParent()
            for size in value.shape:
                dim = found.type.tensor_type.shape.dim.add()
                if isinstance(size, int):
                    dim.dim_value = size
                elif size.value is not None:
                    dim.dim_param = self.sizes.setdefault(size.value, f"s{len(self.sizes)}")
        return found

    def renamed(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """A node with the stage's own names, its subgraphs included, and without remarks."""
        found = onnx.NodeProto(op_type=node.op_type, domain=node.domain, overload=node.overload)
        found.input.extend(self.named(name) for name in node.input)
        found.output.extend(self.named(name) for name in node.output)
        for attribute in node.attribute:
            mine = found.attribute.add()
            mine.CopyFrom(attribute)
            for graph in (mine.g, *mine.graphs) if attribute.HasField("g") or attribute.graphs else ():
                if graph.node or graph.output:
                    self.rename(graph)
        return found

    def rename(self, graph: onnx.GraphProto) -> None:
        """Gives a subgraph the stage's own names, in place."""
        for each in (*graph.input, *graph.initializer):
            each.name = self.named(each.name)
        nodes = [self.renamed(node) for node in graph.node]
        del graph.node[:], graph.value_info[:], graph.metadata_props[:]
        graph.node.extend(nodes)
        for value in graph.output:
            value.name, kind = self.named(value.name), value.type.tensor_type.elem_type
            value.ClearField("type")
            value.type.tensor_type.elem_type = kind
        graph.name = "branch"
