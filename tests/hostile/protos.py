"""Changing a graph file, with or without a new seal, and putting nodes where the logits go through them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from graphlens.surgery.files import write_graph
from tests.hostile.cases import HarnessError, Owed, Place, Variant, Variants

Change = Callable[[onnx.ModelProto], Any]
MODEL, WEIGHTS = "model.onnx", "model.safetensors"
SEALED = (
    "-sealed"  # of the names of variants whose graph file was written anew by graphlens, as someone bent on harm would
)


def read(place: Place) -> onnx.ModelProto:
    """The graph of the place's model."""
    return onnx.load(place.model / MODEL, load_external_data=False)


def rewrite(place: Place, change: Change) -> None:
    """Changes the graph file, byte for byte as protobuf writes it."""
    proto, before = read(place), read(place)
    change(proto)
    if proto == before:
        raise HarnessError("this variant is the untouched file")
    (place.model / MODEL).write_bytes(proto.SerializeToString())


def reseal(place: Place) -> None:
    """Writes the graph file as graphlens writes one, with what it says of its own bytes; as it is, if it can't be read."""
    try:
        write_graph(ir.from_proto(read(place)), place.model / MODEL)
    except Exception:  # noqa: BLE001  what graphlens cannot write, nobody can seal by it: the variant stays unsealed
        return


def both(name: str, change: Change, sealed: Owed = "either", raw: Owed = "refused", part: str = "graph") -> Variants:
    """A change of the graph file as damage, and the same sealed."""

    def plain(place: Place) -> None:
        rewrite(place, change)

    def with_seal(place: Place) -> None:
        rewrite(place, change)
        reseal(place)

    yield Variant(name, plain, raw, part)
    yield Variant(name + SEALED, with_seal, sealed, part)


def external(proto: onnx.ModelProto, index: int = 0) -> TensorProto:
    """One of the tensors that lie in the weights file."""
    found = [tensor for tensor in proto.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    return found[index % len(found)]


def manifest_of(proto: onnx.ModelProto) -> dict[str, Any]:
    """A graph's manifest."""
    found: dict[str, Any] = json.loads(next(p.value for p in proto.metadata_props if p.key == "graphlens"))
    return found


def set_manifest(proto: onnx.ModelProto, manifest: Any) -> None:
    """Puts another manifest in: text as it is, all else as JSON."""
    entry = next(p for p in proto.metadata_props if p.key == "graphlens")
    entry.value = manifest if isinstance(manifest, str) else json.dumps(manifest, separators=(",", ":"))


def number(name: str, value: Any, kind: int = TensorProto.INT64) -> onnx.NodeProto:
    """A Constant: a number, or a list of them."""
    values = value if isinstance(value, list) else [value]
    shape = [len(values)] if isinstance(value, list) else []
    return helper.make_node("Constant", [], [name], value=helper.make_tensor(name, kind, shape, values))


def through_the_logits(make: Callable[[], Sequence[onnx.NodeProto]], last: str) -> Change:
    """Adds nodes, and 0 times the sum of what the last one gives to the logits: they must run, and change nothing."""

    def apply(proto: onnx.ModelProto) -> None:
        for node in proto.graph.node:
            for index, output in enumerate(node.output):
                if output == "logits":
                    node.output[index] = "logits/before"
        tail = [
            helper.make_node("Cast", [last], ["hostile/float"], to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["hostile/float"], ["hostile/sum"], keepdims=0),
            number("hostile/zero", 0.0, TensorProto.FLOAT),
            helper.make_node("Mul", ["hostile/sum", "hostile/zero"], ["hostile/nothing"]),
            helper.make_node("Add", ["logits/before", "hostile/nothing"], ["logits"]),
        ]
        proto.graph.node.extend([*make(), *tail])

    return apply


def beside(make: Callable[[], Sequence[onnx.NodeProto]]) -> Change:
    """Adds nodes whose outputs nothing reads."""
    return lambda proto: proto.graph.node.extend(make())
