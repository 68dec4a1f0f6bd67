"""Whether a hooked graph computes from one hook point to another what TransformerLens's weights say: nothing less, nothing more.

Rewrites that compute from the weights (flagged hook points, weight processing, edits folded into weights) replace a stretch of
the graph by what they take it for. Where a norm follows attention, or a bias has no name, they would silently compute
something else: they ask here first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphlens.file.manifest import Manifest
from graphlens.file.names import split_name
from graphlens.file.stored import StoredWeights
from graphlens.surgery.graph import values_by_name
from graphlens.surgery.sublayers import Sublayer, norm_weights

Place = str | ir.Value
"""A hook point by its name, or a value of the graph."""

# Where numbers only move, and where a weight meets them.
_LAYOUT = {"Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Concat", "Cast", "Identity", "Flatten"}
_LINEAR = {*_LAYOUT, "MatMul", "Gemm", "Add", "Mul"}
_NORM = {"ReduceMean", "Sub", "Mul", "Pow", "Add", "Sqrt", "Div", "Reciprocal", "Cast", "Identity"}


@dataclass
class _Stretch:
    """What a graph computes one value from, back to another.

    Attributes:
        nodes: The nodes on the way.
        weights: The initializers in files that they read, each with what is added to it first.
        constants: The floating-point constants that they read.
        whole: True if all of it begins at that other value; shapes do not count.
    """

    nodes: set[ir.Node] = field(default_factory=set)
    weights: set[tuple[str, float]] = field(default_factory=set)
    constants: list[ir.Value] = field(default_factory=list)
    whole: bool = False

    @property
    def operators(self) -> set[str]:
        """The operators of the nodes."""
        return {node.op_type for node in self.nodes}


class Structure:
    """Asks what a hooked graph computes between hook points.

    Args:
        model: A hooked model.
        manifest: Its manifest.

    Attributes:
        known: The nodes of all that was found to be as asked.
    """

    def __init__(self, model: ir.Model, manifest: Manifest) -> None:
        self._values, self._manifest = values_by_name(model), manifest
        self._stored = StoredWeights(model, manifest)
        self.known: set[ir.Node] = set()

    def value(self, place: Place) -> ir.Value | None:
        """The value of a hook point; None for one that the model does not have."""
        if isinstance(place, ir.Value):
            return place
        entry = self._manifest.hooks.get(place)
        return None if entry is None else self._values.get(entry.value)

    def is_linear(self, start: Place, end: Place | None, weights: Iterable[str], late: str | None = None) -> bool:
        """True if one value is another times some weights, plus biases, and nothing else.

        Args:
            start: What all of it is computed from.
            end: What is computed; None stands for a value that was not found.
            weights: TransformerLens names of the weights; those that the model lacks do not count.
            late: A hook point that is added once on the way, before the last weight.
        """
        beside = [] if late is None else [value for value in [self.value(late)] if value is not None]
        found = None if end is None else self._stretch(start, end, *beside)
        if found is None or not found.whole or not found.operators <= _LINEAR:
            return False
        if any([node.op_type for node, _ in value.uses() if node in found.nodes] != ["Add"] for value in beside):
            return False
        names = [name for name in weights if self._stored.entry(name) is not None]
        wanted = {self._read(name) for name in names}
        # What multiplies the output is in the views of its weights.
        dtype = np.dtype(self._manifest.config.dtype)
        times = {times for name in names if (times := self._stored.views[name].times) is not None}
        if [_number(constant) for constant in found.constants] != [
            float(np.asarray(number, dtype)) for number in times
        ]:
            return False
        if found.weights != wanted or not all(map(_is_plain, found.nodes)):
            return False
        self.known |= found.nodes
        return True

    def _read(self, name: str) -> tuple[str, float]:
        """The initializer of a weight, and what the graph adds to it."""
        dtype = np.dtype(self._manifest.config.dtype)
        return str(self._stored.initializer(name).name), float(np.asarray(self._stored.views[name].plus or 0, dtype))

    def is_norm(self, residual: Place, norm: str) -> bool:
        """True if ``<norm>.hook_normalized`` is a residual stream normalised as the config says, and nothing else.

        Args:
            residual: What is normalised.
            norm: The norm's name ("blocks.0.ln1").
        """
        found, config = self._stretch(residual, f"{norm}.hook_normalized"), self._manifest.config
        if found is None or not found.whole or found.weights or not found.operators <= _NORM:
            return False
        scale = self.value(f"{norm}.hook_scale")
        if scale is None or scale.producer() not in found.nodes:
            return False
        scalars = [value.const_value.numpy() for value in found.constants if value.const_value is not None]
        # In the constant's own dtype: squares may be summed in a wider one than the model computes in.
        is_eps = [scalar.size == 1 and scalar == np.asarray(config.eps, scalar.dtype) for scalar in scalars]
        others = {
            float(scalar.reshape(()))
            for scalar, is_it in zip(scalars, is_eps, strict=True)
            if not is_it and scalar.size == 1
        }
        whole = len(scalars) == len(found.constants) and all(scalar.size == 1 for scalar in scalars)
        if not whole or not any(is_eps) or not others <= {2.0}:  # a square as Pow
            return False
        if ("Sub" in found.operators) != self._centres(norm):
            return False
        self.known |= found.nodes
        return True

    def _centres(self, norm: str) -> bool:
        """True if a norm subtracts the mean."""
        return self._manifest.config.norm_centres(split_name(norm)[1])

    def normalised_by(self, norm: str) -> ir.Value | None:
        """What a norm normalises, which may be no hook point; None where its last node is no division.

        Args:
            norm: The norm's name ("blocks.0.ln1_post").
        """
        value = self.value(f"{norm}.hook_normalized")
        for operator in ("Div", "Sub") if self._centres(norm) else ("Div",):
            node = None if value is None else value.producer()
            if node is None or node.op_type != operator:
                return None
            value = node.inputs[0]
        return value

    def summed(self, part: Sublayer) -> ir.Value | None:
        """What a sublayer's last matrix gives: what is written, or what the norm after it reads."""
        return self.value(part.written) if part.post is None else self.normalised_by(part.post)

    def reads(self, part: Sublayer, hook: str, late: bool = False) -> bool:
        """True if the hook point of a first matrix's output is what the sublayer says it is, from ``part.start`` on.

        Args:
            part: The sublayer.
            hook: The hook point.
            late: True allows that it is computed from what the sublayer adds after the norm besides.
        """
        return self.is_linear(part.start, hook, part.weights(hook), part.late.get(hook) if late else None)

    def writes(self, part: Sublayer) -> bool:
        """True if what a sublayer writes is computed from ``part.inner`` as the sublayer says."""
        end = self.summed(part)
        if end is None or not self.is_linear(part.inner, end, part.out):
            return False
        if part.post is None:
            return True
        normal = f"{part.post}.hook_normalized"
        return self.is_norm(end, part.post) and self.is_linear(normal, part.written, norm_weights(part.post))

    def is_read_by(self, start: str, shared: Sequence[str], matrices: Iterable[str]) -> bool:
        """True if all that reads a hook point are matrices, each once, after some weights that they share.

        Args:
            start: The hook point.
            shared: TransformerLens names of a norm's weight and bias, in the order in which they apply; those that the
                model lacks do not count.
            matrices: Names of the matrices.
        """
        value, nodes = self.value(start), set[ir.Node]()
        for name in shared:
            if self._stored.entry(name) is None:
                continue
            readers = [] if value is None else [(n, i) for n, i in value.uses() if n.op_type != "Shape"]
            if len(readers) != 1 or readers[0][0].op_type != ("Mul" if name.endswith(".w") else "Add"):
                return False
            ((node, index),) = readers
            other = node.inputs[1 - index]
            stored = None if other is None else stored_weight(other)
            if stored is None or (str(stored[0].name), stored[1]) != self._read(name):
                return False
            nodes.add(node)
            value = node.outputs[0]
        found, waiting = list[tuple[str, float]](), [value]
        while waiting:
            one = waiting.pop()
            for node, index in () if one is None else one.uses():
                other = node.inputs[1] if len(node.inputs) > 1 else None
                if node.op_type == "Shape":
                    continue
                if node.op_type in _LAYOUT and index == 0:
                    waiting += node.outputs
                elif node.op_type in ("Gemm", "MatMul") and index == 0 and other is not None and _is_plain(node):
                    stored = stored_weight(other)
                    found += [] if stored is None else [(str(stored[0].name), stored[1])]
                else:
                    return False
                nodes.add(node)
        if sorted(found) != sorted(map(self._read, matrices)):
            return False
        self.known |= nodes
        return True

    def is_mixed(self, start: str, end: str, pattern: str) -> bool:
        """True if one hook point is the average of another's positions by a pattern of attention, and nothing else.

        Args:
            start: The values.
            end: What comes of them.
            pattern: The pattern.
        """
        weights, last = self.value(pattern), self.value(end)
        if weights is None or last is None:
            return False
        found = self._stretch(start, end, weights)
        return (
            found is not None
            and found.whole
            and not found.weights
            and not found.constants
            and found.operators <= {*_LAYOUT, "Expand", "MatMul"}
            and sum(node.op_type == "MatMul" for node in found.nodes) == 1
        )

    def is_sum(self, total: str, parts: Sequence[str]) -> bool:
        """True if one hook point is the sum of others, or the same as a single one.

        Args:
            total: The sum.
            parts: Its terms.
        """
        value, terms = self.value(total), [self.value(part) for part in parts]
        if value is None or any(term is None for term in terms):
            return False
        if len(terms) == 1:
            return value is terms[0]
        nodes, found, waiting = set[ir.Node](), list[int](), [value]
        while waiting:
            one = waiting.pop()
            node = one.producer()
            if any(one is term for term in terms):
                found.append(id(one))
                continue
            read_elsewhere = one is not value and any(reader not in nodes for reader, _ in one.uses())
            if node is None or node.op_type != "Add" or None in node.inputs or read_elsewhere:
                return False
            nodes.add(node)
            waiting += [given for given in node.inputs if given is not None]
        if sorted(found) != sorted(map(id, terms)):
            return False
        self.known |= nodes
        return True

    def only_known_read(self, hook: str) -> bool:
        """True if what was found to be as asked is all that reads a hook point; who looks at its shape does not read it."""
        value = self.value(hook)
        return value is not None and all(node in self.known or node.op_type == "Shape" for node, _ in value.uses())

    def nothing_leaves(self, start: str, ends: Sequence[str], late: Iterable[str] = ()) -> bool:
        """True if what is computed between a hook point and others goes to those others alone.

        Args:
            start: The hook point.
            ends: The others.
            late: Hook points that are added on the way.
        """
        beside = [value for value in map(self.value, late) if value is not None]
        done = {id(self.value(end)) for end in ends}
        inside = set[ir.Node]()
        for end in ends:
            found = self._stretch(start, end, *beside)
            inside |= set() if found is None else found.nodes
        outputs = [output for node in inside for output in node.outputs if id(output) not in done]
        return self.only_known_read(start) and all(
            reader in inside or reader.op_type == "Shape" for output in outputs for reader, _ in output.uses()
        )

    def _stretch(self, start: Place, end: Place, *ends: ir.Value) -> _Stretch | None:
        """What a value is computed from, back to another and perhaps more; None where one of the two is not there."""
        first, last = self.value(start), self.value(end)
        if first is None or last is None:
            return None
        found, waiting, begun, foreign = _Stretch(), [last], False, False
        while waiting:
            value = waiting.pop()
            if value is first:
                begun = True
                continue
            if any(value is one for one in ends):
                continue
            node = value.producer()
            if node is not None:
                if node in found.nodes or node.op_type == "Shape" or _is_shape(value):
                    continue
                found.nodes.add(node)
                shifted = _shifted_weight(node)
                if shifted is not None:
                    found.weights.add(shifted)
                    continue
                waiting += [given for given in node.inputs if given is not None]
            elif isinstance(value.const_value, ir.ExternalTensor):
                found.weights.add((str(value.name), 0.0))
            elif value.const_value is None:
                foreign = True  # an input of the graph
            elif value.const_value.dtype.is_floating_point():
                found.constants.append(value)
        found.whole = begun and not foreign
        return found


def _shifted_weight(node: ir.Node) -> tuple[str, float] | None:
    """(initializer, number) where a node adds a number to a weight; None for any other node."""
    weight = node.outputs[0] if node.op_type == "Add" else None
    stored = None if weight is None else stored_weight(weight)
    return None if stored is None else (str(stored[0].name), stored[1])


def _is_shape(value: ir.Value) -> bool:
    """True for integers computed from shapes, which no activation is."""
    return value.dtype in (ir.DataType.INT64, ir.DataType.INT32)


def _is_plain(node: ir.Node) -> bool:
    """False for a product or sum that is more than its operands', and for a product of two activations."""
    if node.op_type == "Gemm" and any(
        name in node.attributes and node.attributes[name].value != 1 for name in ("alpha", "beta")
    ):
        return False
    if node.op_type == "Mul" and any(_number(value) is not None for value in node.inputs):
        return True  # which number it is was looked at
    return node.op_type not in ("Gemm", "MatMul", "Mul") or any(
        value is not None and stored_weight(value) is not None for value in node.inputs
    )


def stored_weight(value: ir.Value) -> tuple[ir.Value, float] | None:
    """The initializer in a file that a value is, also cast, laid out otherwise, or with a number added.

    Args:
        value: A value of a graph.

    Returns:
        (the initializer, what is added to it); None for what is no weight.
    """
    plus = 0.0
    while (node := value.producer()) is not None:
        source, number = node.inputs[0], 0.0
        if node.op_type == "Add":
            added = [_number(one) for one in node.inputs]
            if added.count(None) != 1:
                return None
            source, number = node.inputs[added.index(None)], added[1 - added.index(None)] or 0.0
        elif node.op_type not in _LAYOUT:
            return None
        if source is None:
            return None
        value, plus = source, plus + number
    return (value, plus) if isinstance(value.const_value, ir.ExternalTensor) else None


def _number(value: ir.Value | None) -> float | None:
    """The number that a constant of the graph holds; None for any other value."""
    tensor = None if value is None or value.producer() is not None else value.const_value
    if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.size != 1:
        return None
    return float(tensor.numpy().reshape(()))
