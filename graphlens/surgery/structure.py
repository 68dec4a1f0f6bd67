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
from graphlens.file.stored import StoredWeights
from graphlens.surgery.graph import values_by_name

# Where numbers only move, and where a weight meets them.
_LAYOUT = {"Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Concat", "Cast", "Identity", "Flatten"}
_LINEAR = {*_LAYOUT, "MatMul", "Gemm", "Add", "Mul"}
_NORM = {"ReduceMean", "Sub", "Mul", "Pow", "Add", "Sqrt", "Div", "Reciprocal", "Cast", "Identity"}


@dataclass
class _Stretch:
    """What a graph computes one value from, back to another.

    Attributes:
        nodes: The nodes on the way.
        weights: The initializers in files that they read.
        constants: The floating-point constants that they read.
        whole: True if all of it begins at that other value; shapes do not count.
    """

    nodes: set[ir.Node] = field(default_factory=set)
    weights: set[str] = field(default_factory=set)
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

    def value(self, hook: str) -> ir.Value | None:
        """The value of a hook point; None for one that the model does not have."""
        entry = self._manifest.hooks.get(hook)
        return None if entry is None else self._values.get(entry.value)

    def is_linear(self, start: str, end: str, weights: Iterable[str]) -> bool:
        """True if one hook point is another times some weights, plus biases, and nothing else.

        Args:
            start: The hook point that all of it is computed from.
            end: The hook point.
            weights: TransformerLens names of the weights; those that the model lacks do not count.
        """
        found = self._stretch(start, end)
        if found is None or not found.whole or found.constants or not found.operators <= _LINEAR:
            return False
        wanted = {str(self._stored.initializer(name).name) for name in weights if self._stored.entry(name) is not None}
        if found.weights != wanted or not all(map(_is_plain, found.nodes)):
            return False
        self.known |= found.nodes
        return True

    def is_norm(self, residual: str, norm: str) -> bool:
        """True if ``<norm>.hook_normalized`` is a residual stream normalised as the config says, and nothing else.

        Args:
            residual: The hook point that is normalised.
            norm: The norm's name ("blocks.0.ln1").
        """
        found, config = self._stretch(residual, f"{norm}.hook_normalized"), self._manifest.config
        if found is None or not found.whole or found.weights or not found.operators <= _NORM:
            return False
        scale = self.value(f"{norm}.hook_scale")
        if scale is None or scale.producer() not in found.nodes:
            return False
        scalars = [value.const_value.numpy() for value in found.constants if value.const_value is not None]
        numbers = {float(scalar.reshape(())) for scalar in scalars if scalar.size == 1}
        eps = {float(np.asarray(config.eps, kind)) for kind in (config.dtype, "float32")}  # see precision.py
        if (
            len(scalars) != len(found.constants) or not numbers <= eps | {2.0} or not eps & numbers
        ):  # 2: a square as Pow
            return False
        if ("Sub" in found.operators) != config.normalization_type.startswith("LN"):
            return False
        self.known |= found.nodes
        return True

    def is_sum(self, total: str, parts: Sequence[str]) -> bool:
        """True if one hook point is the sum of two others, or the same as a single one.

        Args:
            total: The sum.
            parts: Its terms.
        """
        value, terms = self.value(total), [self.value(part) for part in parts]
        if value is None or any(term is None for term in terms):
            return False
        if len(terms) == 1:
            return value is terms[0]
        node = value.producer()
        if node is None or node.op_type != "Add" or {id(one) for one in node.inputs} != {id(one) for one in terms}:
            return False
        self.known.add(node)
        return True

    def only_known_read(self, hook: str) -> bool:
        """True if what was found to be as asked is all that reads a hook point; who looks at its shape does not read it."""
        value = self.value(hook)
        return value is not None and all(node in self.known or node.op_type == "Shape" for node, _ in value.uses())

    def nothing_leaves(self, start: str, ends: Sequence[str]) -> bool:
        """True if what is computed between a hook point and others goes to those others alone.

        Args:
            start: The hook point.
            ends: The others.
        """
        done = {id(self.value(end)) for end in ends}
        inside = set[ir.Node]()
        for end in ends:
            found = self._stretch(start, end)
            inside |= set() if found is None else found.nodes
        outputs = [output for node in inside for output in node.outputs if id(output) not in done]
        return self.only_known_read(start) and all(
            reader in inside or reader.op_type == "Shape" for output in outputs for reader, _ in output.uses()
        )

    def _stretch(self, start: str, end: str) -> _Stretch | None:
        """What a hook point is computed from, back to another; None where one of them is not there."""
        first, last = self.value(start), self.value(end)
        if first is None or last is None:
            return None
        found, waiting, begun, foreign = _Stretch(), [last], False, False
        while waiting:
            value = waiting.pop()
            if value is first:
                begun = True
                continue
            node = value.producer()
            if node is not None:
                if node in found.nodes or node.op_type == "Shape" or _is_shape(value):
                    continue
                found.nodes.add(node)
                waiting += [given for given in node.inputs if given is not None]
            elif isinstance(value.const_value, ir.ExternalTensor):
                found.weights.add(str(value.name))
            elif value.const_value is None:
                foreign = True  # an input of the graph
            elif value.const_value.dtype.is_floating_point():
                found.constants.append(value)
        found.whole = begun and not foreign
        return found


def _is_shape(value: ir.Value) -> bool:
    """True for integers computed from shapes, which no activation is."""
    return value.dtype in (ir.DataType.INT64, ir.DataType.INT32)


def _is_plain(node: ir.Node) -> bool:
    """False for a product or sum that is more than its operands', and for a product of two activations."""
    if node.op_type == "Gemm" and any(
        name in node.attributes and node.attributes[name].value != 1 for name in ("alpha", "beta")
    ):
        return False
    return node.op_type not in ("Gemm", "MatMul", "Mul") or any(_is_weight(value) for value in node.inputs)


def _is_weight(value: ir.Value | None) -> bool:
    """True for an initializer in a file, also cast or laid out otherwise."""
    while value is not None and (node := value.producer()) is not None and node.op_type in _LAYOUT:
        value = node.inputs[0]
    return value is not None and isinstance(value.const_value, ir.ExternalTensor)
