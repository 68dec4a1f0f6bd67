"""Models of one fused operator: built from arrays, run by ONNX Runtime as they are and again after unfusing, and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from graphlens import surgery
from graphlens.surgery.unfusing import Unfused

Array = npt.NDArray[Any]
MICROSOFT = "com.microsoft"
RNG = np.random.default_rng


def normal(seed: int, *shape: int, dtype: Any = np.float32) -> Array:
    return RNG(seed).standard_normal(shape).astype(dtype)


@dataclass(frozen=True)
class Fused:
    """A model of one node, and what to feed it.

    inputs: an array for each input of the node (None: left out), each an input of the graph unless its place is in constants.
    """

    operator: str
    inputs: Sequence[Array | None]
    outputs: int = 1
    domain: str = MICROSOFT
    opset: int = 21
    attributes: Mapping[str, Any] | None = None
    constants: tuple[int, ...] = ()
    left_out: tuple[int, ...] = ()
    typed: tuple[int, ...] = ()
    symbolic: bool = True  # sizes of inputs are names; else what the arrays have

    def names(self) -> list[str]:
        return ["" if place in self.left_out else f"out{place}" for place in range(self.outputs)]

    def proto(self) -> onnx.ModelProto:
        names = ["" if array is None else f"in{place}" for place, array in enumerate(self.inputs)]
        while not names[-1]:
            names.pop()
        node = helper.make_node(
            self.operator, names, self.names(), name="fused", domain=self.domain, **(self.attributes or {})
        )
        inputs, initializers = [], []
        for place, array in enumerate(self.inputs):
            if array is None:
                continue
            if place in self.constants:
                initializers.append(numpy_helper.from_array(array, f"in{place}"))
            else:
                kind = helper.np_dtype_to_tensor_dtype(array.dtype)
                sizes = [f"in{place}_{axis}" for axis in range(array.ndim)]
                # The last axis of an activation is a number in every file that was seen.
                shape = [*sizes[:-1], array.shape[-1]] if self.symbolic and array.ndim > 1 else list(array.shape)
                inputs.append(helper.make_tensor_value_info(f"in{place}", kind, shape))
        # The type of an output is inferred, but of few that are seldom asked for.
        outputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            if place in self.typed
            else helper.make_value_info(name, onnx.TypeProto())
            for place, name in enumerate(self.names())
            if name
        ]
        graph = helper.make_graph([node], "one", inputs, outputs, initializers)
        domains = [helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=domains, ir_version=10)

    def feeds(self) -> dict[str, Array]:
        return {
            f"in{place}": array
            for place, array in enumerate(self.inputs)
            if array is not None and place not in self.constants
        }

    def model(self) -> ir.Model:
        return ir.from_proto(self.proto())

    def unfused(self) -> Unfused:
        return surgery.unfuse(self.model())


FUSED = ("Attention", "RMSNormalization", "LayerNormalization", "RotaryEmbedding", "SimplifiedLayerNormalization")


def session(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options)


def run(proto: onnx.ModelProto, feeds: dict[str, Array]) -> list[Array]:
    found: list[Array] = session(proto).run(None, feeds)
    return found


def run_unfused(fused: Fused) -> list[Array]:
    """The outputs of the model after unfusing, which left no fused operator in it."""
    done = fused.unfused()
    assert not done.kept, done.kept
    nodes = list(done.model.graph)
    assert {node.domain for node in nodes} == {""}
    assert not [node.op_type for node in nodes if node.op_type in FUSED or node.op_type.startswith("QLinear")]
    new = [str(node.name) for node in nodes if node.name != "fused"]
    assert all(name.startswith("fused/") and done.origin[name] == "fused" for name in new)
    assert set(done.origin) == set(new)
    proto = ir.to_proto(done.model)
    assert [output.name for output in proto.graph.output] == [name for name in fused.names() if name]
    return run(proto, fused.feeds())


def difference(found: Array, expected: Array, valid: Array | None = None) -> float:
    """The largest difference, relative to the largest number that is expected."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    left, right = found.astype(np.float64), expected.astype(np.float64)
    if valid is not None:
        where = np.broadcast_to(valid, left.shape)
        left, right = left[where], right[where]
    assert np.isfinite(right).all()
    assert np.isfinite(left).all()
    return float(np.abs(left - right).max(initial=0) / max(np.abs(right).max(initial=0), 1e-6))


def same(fused: Fused, tolerance: float = 1e-5, valid: Mapping[int, Array] | None = None) -> list[Array]:
    """The outputs of the fused model, after unfusing was found to give the same."""
    expected = run(fused.proto(), fused.feeds())
    found = run_unfused(fused)
    for place, (left, right) in enumerate(zip(found, expected, strict=True)):
        assert difference(left, right, (valid or {}).get(place)) <= tolerance, f"output {place}"
    return found


FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
