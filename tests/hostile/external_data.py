"""Where a tensor's data are said to lie: outside, nowhere, on another tensor, in what is no file."""

from __future__ import annotations

import os
import random
import shutil
import socket
from pathlib import Path
from typing import Any

import onnx

from tests.hostile.cases import Place, Variant, Variants
from tests.hostile.protos import MODEL, WEIGHTS, Change, both, external, read, reseal, rewrite

LOCATIONS = (
    f"../../outside/{WEIGHTS}", f"inside/../../../outside/{WEIGHTS}", "/etc/passwd", "/dev/zero", "/proc/self/mem",
    "C:\\Windows\\win.ini", "C:win.ini", "\\\\server\\share\\weights", "\\weights", f"..\\..\\outside\\{WEIGHTS}", "", ".", "..",
    "*/_ORT_MEM_ADDR_/*", "_ORT_MEM_ADDR_", "*/_ORT_MEM_ADDR_/*1", f"./{WEIGHTS}", f"{WEIGHTS}/", f"{WEIGHTS}\0x", "absent",
    MODEL, f"file://{WEIGHTS}", WEIGHTS.upper(), f" {WEIGHTS}", "~/weights", "$HOME", "a" * 300, "\ud7ff", "config.json",
)  # fmt: skip
PLACES: tuple[dict[str, Any], ...] = (
    {"offset": 10**9}, {"offset": -8}, {"offset": "x"}, {"offset": "1e3"}, {"offset": 2**63}, {"offset": 2**64},
    {"offset": "٣"}, {"offset": " 8"}, {"offset": "0x10"}, {"offset": ""}, {"offset": 0}, {"length": 4}, {"length": 0},
    {"length": 10**12}, {"length": -4}, {"length": 2**64 - 1}, {"length": "1_0"}, {"checksum": "0" * 40},
    {"basepath": "/"}, {"prepacked_0": "x"}, {"location2": "../x"},
)  # fmt: skip


def pointing(index: int = 0, **entries: Any) -> Change:
    """Sets entries of a tensor's external data."""

    def apply(proto: onnx.ModelProto) -> None:
        tensor = external(proto, index)
        old = {entry.key: entry.value for entry in tensor.external_data}
        tensor.ClearField("external_data")
        for key, value in {**old, **entries}.items():
            tensor.external_data.add(key=key, value=str(value))

    return apply


def shifted(bytes_: int, index: int) -> Change:
    """Moves where a tensor begins."""

    def apply(proto: onnx.ModelProto) -> None:
        tensor = external(proto, index)
        for entry in tensor.external_data:
            if entry.key == "offset":
                entry.value = str(max(int(entry.value) + bytes_, 0))

    return apply


def swapped(seed: int) -> Change:
    """Lets two tensors of one size have each other's data."""

    def apply(proto: onnx.ModelProto) -> None:
        tensors = [external(proto, index) for index in range(len(proto.graph.initializer))]
        pairs = [
            (a, b)
            for a in tensors
            for b in tensors
            if list(a.dims) == list(b.dims) and a.name < b.name and a.external_data
        ]
        one, other = random.Random(seed).choice(pairs)
        kept = [(entry.key, entry.value) for entry in one.external_data]
        one.ClearField("external_data")
        one.external_data.extend(other.external_data)
        other.ClearField("external_data")
        for key, value in kept:
            other.external_data.add(key=key, value=value)

    return apply


def twice(proto: onnx.ModelProto) -> None:
    """Names a location twice; readers disagree on which of them counts."""
    external(proto).external_data.add(key="location", value=f"../../outside/{WEIGHTS}")


def reshaped(proto: onnx.ModelProto) -> None:
    """Exchanges the sizes of a matrix of two different ones."""
    for index in range(len(proto.graph.initializer)):
        tensor = external(proto, index)
        if len(tensor.dims) == 2 and tensor.dims[0] != tensor.dims[1]:
            tensor.dims[:] = list(tensor.dims)[::-1]
            return


def retyped(kind: int) -> Change:
    """Gives a tensor another dtype."""
    return lambda proto: setattr(external(proto), "data_type", kind)


def in_attribute(proto: onnx.ModelProto) -> None:
    """Puts external data outside the folder into a Constant's attribute."""
    tensor = onnx.TensorProto(name="escaping", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=f"../../outside/{WEIGHTS}")
    proto.graph.node.append(onnx.helper.make_node("Constant", [], ["added"], value=tensor))


# What stands where the weights file should


def replaced(kind: str, file: str) -> Any:
    """Puts something else in a file's place: a link, a pipe, a folder, a device."""

    def make(place: Place) -> None:
        path, beside = place.model / file, place.outside / file
        if path.is_file():
            shutil.copyfile(path, beside)
            path.unlink()
        put(path, kind, beside)

    return make


def put(path: Path, kind: str, beside: Path) -> None:
    """Makes a special file.

    Args:
        path: Where.
        kind: "link", "relative link", "link inside", "dangling link", "link to itself", "pipe", "link to a pipe", "folder",
            "socket", "device", "hard link", "empty".
        beside: The file outside that links lead to, with the content that was there.
    """
    if kind == "link":
        path.symlink_to(beside)
    elif kind == "relative link":
        path.symlink_to(os.path.relpath(beside, path.parent))
    elif kind == "link inside":
        shutil.copyfile(beside, path.with_name(f"real-{path.name}"))
        path.symlink_to(f"real-{path.name}")
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(path.with_name("pipe"))
        path.symlink_to("pipe")
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        os.chdir(path.parent)  # a socket's path has 108 bytes
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path.name)
        os.chdir(path.parent)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "hard link":
        os.link(beside, path)
    elif kind == "empty":
        path.touch()
    else:
        raise ValueError(kind)


def _linked_subfolder(place: Place) -> None:
    shutil.copyfile(place.model / WEIGHTS, place.outside / WEIGHTS)
    (place.model / "part").symlink_to(place.outside)
    rewrite(place, pointing(location=f"part/{WEIGHTS}"))


def _sealed_linked_subfolder(place: Place) -> None:
    _linked_subfolder(place)
    reseal(place)


def variants(count: int) -> Variants:
    """Variants of external data; after those made by hand as many random ones as come to ``count``."""
    made = list(_by_hand())
    yield from made[:count]
    for seed in range(count - len(made)):
        rng = random.Random(seed)
        change = rng.choice(
            [
                shifted(rng.choice([-64, 64, 4, 1, 512, 4096]), rng.randrange(50)),
                swapped(seed),
                pointing(rng.randrange(50), offset=rng.randrange(3_600_000)),
                pointing(rng.randrange(50), location=rng.choice(LOCATIONS)),
                pointing(rng.randrange(50), **rng.choice(PLACES)),
            ]
        )
        yield from both(f"random-{seed:04}", change, sealed="safe")


def _by_hand() -> Variants:
    for index in (0, 3, 7):
        yield from both(f"shifted-64-{index}", shifted(64, index), sealed="refused")
    yield from both("swapped", swapped(0), sealed="safe")
    yield from both("reshaped", reshaped, sealed="refused")
    yield from both("float16", retyped(10), sealed="refused")
    yield from both("int32", retyped(6), sealed="refused")
    for kind in (
        "link",
        "relative link",
        "dangling link",
        "link to itself",
        "pipe",
        "link to a pipe",
        "folder",
        "socket",
        "device",
        "empty",
    ):
        yield Variant(f"weights-{kind.replace(' ', '-')}", replaced(kind, WEIGHTS), "refused", "weights")
    yield Variant("weights-hard-link", replaced("hard link", WEIGHTS), "either", "weights")
    yield Variant("linked-subfolder", _linked_subfolder)
    yield Variant("linked-subfolder-sealed", _sealed_linked_subfolder)
    yield from both("twice", twice, sealed="refused")
    yield from both("attribute", in_attribute, sealed="refused")
    for index, location in enumerate(LOCATIONS):
        if location != "\ud7ff":
            owed = "either" if location == f"./{WEIGHTS}" else "refused"
            yield from both(f"location-{index:02}", pointing(location=location), sealed=owed)  # type: ignore[arg-type]
    harmless = {"checksum", "location2", "basepath"}
    for index, place in enumerate(PLACES):
        yield from both(f"place-{index:02}", pointing(**place), sealed="either" if harmless & place.keys() else "safe")
    for kind in (8, 9, 10, 11, 16, 17, 22, 0, 99):
        yield from both(f"dtype-{kind}", retyped(kind), sealed="safe")


def read_back(place: Place) -> onnx.ModelProto:
    """The graph that a variant left, for people."""
    return read(place)
