"""The gradient of one operator by its rule, run by ONNX Runtime, with sizes that are known or found out in the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from graphlens.surgery.rules import Builder, Gradient, rule_of

Array = npt.NDArray[Any]
OPSETS = {"": 21, "com.microsoft": 1}
FIXED = "fixed"  # a size is its number
NAMED = "named"  # an own name for each axis of each value
NAMELESS = "nameless"  # only the number of axes is known


def session_of(graph: ir.Graph) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(), options)


class Operator:
    """One node over some inputs, as a graph that also gives the gradients of some of them.

    Args:
        kind: The operator.
        inputs: What it reads; None for an optional input that is left out.
        wrt: The places of the inputs whose gradients are given. The others are initializers.
        attributes: The node's attributes.
        domain: Its domain.
        outputs: How many outputs it has.
        sizes: What the graph tells of the sizes of its values.
    """

    def __init__(
        self,
        kind: str,
        inputs: Sequence[Array | None],
        wrt: Sequence[int] = (0,),
        attributes: dict[str, Any] | None = None,
        domain: str = "",
        outputs: int = 1,
        sizes: str = FIXED,
    ) -> None:
        self.wrt, self.sizes = wrt, sizes
        self.given = {f"x{i}": inputs[i] for i in wrt}
        values = [None if array is None else self._value(f"x{i}", array, i in wrt) for i, array in enumerate(inputs)]
        node = ir.node(kind, values, attributes or {}, domain=domain, num_outputs=outputs)
        for place, output in enumerate(node.outputs):
            output.name = f"y{place}"
        constants = [value for value in values if value is not None and value.const_value is not None]
        starts = [value for value in values if value is not None and value.const_value is None]
        self.graph = ir.Graph(
            starts, list(node.outputs), nodes=[node], initializers=constants, opset_imports=dict(OPSETS), name="g"
        )
        self.plain = session_of(self.graph)
        self.results = self.plain.run(None, self.given)
        for output, array in zip(node.outputs, self.results, strict=True):
            output.shape, output.type = self._shape(output, array), ir.TensorType(ir.DataType.from_numpy(array.dtype))
        self.node = node
        self._add_gradients(values)

    def _value(self, name: str, array: Array, is_input: bool) -> ir.Value:
        kind = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        if not is_input:
            return ir.Value(name=name, shape=ir.Shape(array.shape), type=kind, const_value=ir.tensor(array, name=name))
        value = ir.Value(name=name, type=kind)
        value.shape = self._shape(value, array)
        return value

    def _shape(self, value: ir.Value, array: Array) -> ir.Shape:
        if self.sizes == FIXED:
            return ir.Shape(array.shape)
        return ir.Shape([None if self.sizes == NAMELESS else f"{value.name}_{axis}" for axis in range(array.ndim)])

    def _add_gradients(self, values: Sequence[ir.Value | None]) -> None:
        first = next(array for array in self.given.values() if array is not None)
        b = Builder(ir.DataType.from_numpy(first.dtype))
        self.seeds = {
            f"seed{i}": weights_of(y.shape).astype(first.dtype)
            for i, y in enumerate(self.results)
            if y.dtype == first.dtype
        }
        grads: list[Gradient | None] = []
        for place, output in enumerate(self.node.outputs):
            name = f"seed{place}"
            if name in self.seeds:
                seed = ir.Value(name=name, shape=output.shape, type=output.type)
                self.graph.inputs.append(seed)
            grads.append(Gradient(seed) if name in self.seeds else None)
        found_rule = rule_of(self.node)
        assert found_rule is not None
        needs = [place in self.wrt for place in range(len(values))]
        found = found_rule(b, self.node, grads, needs)
        assert len(found) == len(values)
        users = [user for output in self.node.outputs for user, _ in output.uses() if user.op_type != "Shape"]
        assert found_rule.reads_output or not users  # a rule that reads its node's output says so
        for place in self.wrt:
            gradient, value = found[place], values[place]
            assert gradient is not None
            assert value is not None
            out = b.op("Identity", b.whole(gradient, value))
            out.name = f"d{place}"
            self.graph.outputs.append(out)
        for constant in b.tape.initializers:
            self.graph.initializers[str(constant.name)] = constant
        self.graph.extend(list(b.tape.nodes))

    def gradients(self) -> list[Array]:
        """d(sum of weights_of(y) * y)/d(each input asked for), over all outputs of the inputs' dtype."""
        return list(session_of(self.graph).run([f"d{place}" for place in self.wrt], {**self.given, **self.seeds}))

    def weighted(self, given: dict[str, Array]) -> float:
        """What is differentiated, at other inputs."""
        results = self.plain.run([f"y{name[4:]}" for name in self.seeds], given)
        return sum(float((y.astype(np.float64) * weights_of(y.shape)).sum()) for y in results)

    def check(self, step: float = 1e-6, tolerance: float = 2e-5, places: int = 4) -> None:
        """Compares the gradients with central differences, at entries drawn by chance and along a direction of all of them."""
        draw = np.random.default_rng(8)
        for place, found in zip(self.wrt, self.gradients(), strict=True):
            x = self.given[f"x{place}"]
            assert x is not None
            assert found.shape == x.shape
            assert found.dtype == x.dtype
            directions = [draw.standard_normal(x.shape)]
            for _ in range(places):
                one = np.zeros(x.size)
                one[draw.integers(x.size)] = 1
                directions.append(one.reshape(x.shape))
            for direction in directions:
                ends = [
                    self.weighted({**self.given, f"x{place}": (x + sign * step * direction).astype(x.dtype)})
                    for sign in (1, -1)
                ]
                slope = (ends[0] - ends[1]) / (2 * step)
                given = float((found.astype(np.float64) * direction).sum())
                assert abs(given - slope) <= tolerance * max(0.1, abs(slope)), (given, slope)


def weights_of(shape: Sequence[int]) -> Array:
    """What the entries of a result weigh in the sum that is differentiated: all different."""
    return np.random.default_rng(6).uniform(0.5, 1.5, shape)
