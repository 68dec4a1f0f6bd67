"""Damaged and hostile files of other programs, looked at, exposed and adopted: an error of ours, or an answer; nothing else."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx

from graphlens import HookedTransformer
from graphlens.file.folder import MODEL_FILE
from tests import foreign_files
from tests.hostile.cases import Case, Owed, Place
from tests.hostile.routes import command
from tests.hostile.truth import bare_session, differs

FEW, MANY = 4, 60  # damages of each file, in CI and where everything is played
IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
# File -> (what makes it, a value that is not an output). Those with weights beside them have them in this file.
BASES: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "decoder": (foreign_files.decoder, "h.1.pattern"),
    "external": (foreign_files.decoder, "h.1.pattern"),
    "cross": (foreign_files.cross_attention, "cross_pattern"),
    "merged": (foreign_files.merged, "x"),
    "types": (foreign_files.all_types, "maybe"),
    "cnn": (foreign_files.convolutions, "r"),
}
_WEIGHTS = "weights.bin"


def cases(everything: bool, only: str | None = None) -> Iterator[Case]:
    """The cases of foreign files.

    Args:
        everything: Play many damages of each; else a few.
        only: The one group to make, as the names of its cases begin.
    """
    if only not in (None, "foreign"):
        return
    for base in BASES:
        for route, use in ROUTES.items():
            right: Owed = "refused" if route == "adopt" and base not in ("decoder", "external") else "right"
            yield _case(f"{base}-untouched", base, None, route, use, right)
        for number in range(MANY if everything else FEW):
            for name, damage in DAMAGES.items():
                route = list(ROUTES)[(number + len(name)) % len(ROUTES)]
                for each in ROUTES if everything and number < FEW else (route,):
                    change = partial(damage, random.Random(f"{base} {name} {number}"))
                    yield _case(f"{base}-{name}-{number}", base, change, each, ROUTES[each], "safe")
        for name, change in MADE.items() if base == "decoder" else ():
            for route, use in ROUTES.items():
                yield _case(f"{base}-{name}", base, change, route, use, "safe")


Change = Callable[[bytes], bytes]
Use = Callable[[str, Place], list[str]]


def _case(name: str, base: str, change: Change | None, route: str, use: Use, owed: Owed) -> Case:
    return Case(
        f"foreign/{name}/{route}",
        "files: of other programs",
        partial(_prepare, base, change),
        partial(use, base),
        owed,
        name,
    )


def _prepare(base: str, change: Change | None, place: Place) -> None:
    """Writes a file of another program, changed."""
    file = foreign_files.write(BASES[base][0](), place.model / MODEL_FILE, _WEIGHTS if base == "external" else None)
    if change is not None:
        file.write_bytes(change(file.read_bytes()))


# Damages


def _cut(random: random.Random, data: bytes) -> bytes:
    return data[: random.randrange(len(data))]


def _flipped(random: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 5])):
        changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _overwritten(random: random.Random, data: bytes) -> bytes:
    changed, size = bytearray(data), random.choice([1, 4, 40])
    place = random.randrange(len(data) - size)
    changed[place : place + size] = random.randbytes(size)
    return bytes(changed)


def _doubled(random: random.Random, data: bytes) -> bytes:
    start = random.randrange(len(data))
    return data[:start] + data[start // 2 :]


def _attribute(random: random.Random, data: bytes) -> bytes:
    """A number of an attribute or a size becomes an extreme one."""
    model = onnx.load_model_from_string(data)
    wild = random.choice([-1, 0, 2**31 - 1, 2**62, -(2**63)])
    attributes = [each for node in model.graph.node for each in node.attribute if each.type in (2, 7)]
    tensors = list(model.graph.initializer)
    chosen = random.choice([*attributes, *tensors])
    if isinstance(chosen, onnx.TensorProto):
        chosen.dims[:] = [wild, *chosen.dims[1:]]
    elif chosen.type == onnx.AttributeProto.INT:
        chosen.i = wild
    else:
        chosen.ints[:] = [wild, *chosen.ints[1:]]
    return bytes(model.SerializeToString())


def _rewired(random: random.Random, data: bytes) -> bytes:
    """A node reads another value, or is of another operator or domain."""
    model = onnx.load_model_from_string(data)
    node, other = random.choice(model.graph.node), random.choice(model.graph.node)
    kind = random.randrange(4)
    if kind == 0 and node.input:
        node.input[random.randrange(len(node.input))] = random.choice([*other.output, *other.input])
    elif kind == 1:
        node.op_type, node.domain = random.choice(
            [
                ("Loop", ""),
                ("EPContext", "com.microsoft"),
                (other.op_type, ""),
                ("Attention", "com.microsoft"),
                ("LSTM", ""),
            ]
        )
    elif kind == 2:
        del node.input[:]
    else:
        node.output[0] = other.output[0]
    return bytes(model.SerializeToString())


DAMAGES = {
    "cut": _cut,
    "flipped": _flipped,
    "overwritten": _overwritten,
    "doubled": _doubled,
    "attribute": _attribute,
    "rewired": _rewired,
}


def _elsewhere(location: str, offset: str = "0") -> Change:
    """All weights lie in a file somewhere else."""

    def change(data: bytes) -> bytes:
        model = onnx.load_model_from_string(data)
        for tensor in model.graph.initializer:
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            del tensor.external_data[:]
            for key, text in (("location", location), ("offset", offset), ("length", str(4 * math.prod(tensor.dims)))):
                entry = tensor.external_data.add()
                entry.key, entry.value = key, text
        return bytes(model.SerializeToString())

    return change


def _many_nodes(data: bytes) -> bytes:
    model = onnx.load_model_from_string(data)
    first = model.graph.node[0].output[0]
    for index in range(60_000):
        model.graph.node.add(op_type="Identity", input=[first], output=[f"more{index}"], name=f"more{index}")
    return bytes(model.SerializeToString())


def _huge_value(data: bytes) -> bytes:
    """A value of a terabyte, out of a shape of three numbers."""
    model = onnx.load_model_from_string(data)
    shape = onnx.numpy_helper.from_array(np.array([1 << 14, 1 << 14, 1 << 12]), "huge_shape")
    model.graph.initializer.append(shape)
    model.graph.node.add(op_type="ConstantOfShape", input=["huge_shape"], output=["huge"], name="huge")
    model.graph.node.add(op_type="Identity", input=["huge"], output=["huge_2"], name="huge_2")
    model.graph.output.append(onnx.helper.make_tensor_value_info("huge_2", 1, ["a", "b", "c"]))
    return bytes(model.SerializeToString())


MADE: dict[str, Change] = {
    "outside": _elsewhere("../../outside/secret.txt"),
    "absolute": _elsewhere("/etc/passwd"),
    "memory": _elsewhere("*/_ORT_MEM_ADDR_/*", "140000000000000"),
    "gone": _elsewhere("gone.bin"),
    "many-nodes": _many_nodes,
    "huge-value": _huge_value,
}


# Routes


def _feeds(base: str) -> dict[str, np.ndarray]:
    if base == "merged":
        return {"input_ids": IDS, "use_cache_branch": np.array(True)}
    if base == "cross":
        states = np.random.default_rng(0).normal(size=(2, 3, foreign_files.D)).astype(np.float32)
        return {"input_ids": IDS, "encoder_hidden_states": states}
    if base == "types":
        return {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
    if base == "cnn":
        return {"pixel_values": np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)}
    return {"input_ids": IDS}


def _first_output(base: str, file: Path) -> np.ndarray:
    session = bare_session(str(file))
    return np.asarray(session.run([session.get_outputs()[0].name], _feeds(base))[0])


def _inspect(base: str, place: Place) -> list[str]:
    found = json.loads(command("inspect", place.model / MODEL_FILE, "--json", place=place))
    command("inspect", place.model / MODEL_FILE, place=place)
    wanted = sum(1 for node in BASES[base][0]().graph.node if node.op_type == "MatMul")
    own = found["operators"].get("MatMul", 0)
    return [] if own >= wanted else [f"{own} MatMul, not {wanted}"]


def _list(base: str, place: Place) -> list[str]:
    names = [value["name"] for value in json.loads(command("expose", place.model, "--list", "--json", place=place))]
    return [] if BASES[base][1] in names else ["a value is not listed"]


def _expose(base: str, place: Place) -> list[str]:
    out = place.out.with_suffix(".onnx")
    command("expose", place.model, "--like", BASES[base][1], "-o", out, place=place)
    try:
        return differs(_first_output(base, out), _first_output(base, place.model / MODEL_FILE), "the first output")
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        return [f"plain ONNX Runtime refuses what was written: {str(error)[-200:]}"]


def _adopt(base: str, place: Place) -> list[str]:
    command("adopt", place.model, "-o", place.out, place=place)
    model = HookedTransformer.from_onnx(place.out, "cpu")
    logits, cache = model.run_with_cache(IDS)
    if "blocks.1.attn.hook_pattern" not in cache:
        return ["a hook point is missing"]
    return differs(logits, _first_output(base, place.model / MODEL_FILE), "logits")


ROUTES: dict[str, Use] = {"inspect": _inspect, "list": _list, "expose": _expose, "adopt": _adopt}
