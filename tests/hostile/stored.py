"""Bytes that changed: of the graph file and of the weights file. Every one of them must be noticed."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graphlens import surgery
from tests.hostile.cases import HarnessError, Place, Variant, Variants
from tests.hostile.protos import MODEL, WEIGHTS

Bytes = Callable[[bytearray, random.Random], None]


def flip(data: bytearray, rng: random.Random) -> None:
    """One bit."""
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def zero(data: bytearray, rng: random.Random) -> None:
    """A page of zeros, as a disk that was full leaves."""
    at = rng.randrange(len(data))
    length = len(data[at : at + 4096])
    if not any(data[at : at + length]):
        data[at] = 1
    data[at : at + length] = bytes(length) if any(data[at : at + length]) else b"\1" * length


def cut(data: bytearray, rng: random.Random) -> None:
    """The end is missing."""
    del data[rng.randrange(len(data)) :]


def cut_one(data: bytearray, _: random.Random) -> None:
    """The last byte is missing."""
    del data[-1]


def longer(data: bytearray, _: random.Random) -> None:
    """One more byte at the end."""
    data.append(0)


def exchange(data: bytearray, rng: random.Random) -> None:
    """Two runs of bytes change places."""
    one, other = sorted(rng.sample(range(0, len(data) - 64, 64), 2))
    data[one : one + 64], data[other : other + 64] = data[other : other + 64], data[one : one + 64]
    data[one] ^= 1  # equal runs would leave the file as it was


def nothing(data: bytearray, _: random.Random) -> None:
    """An empty file."""
    data.clear()


def garbage(data: bytearray, rng: random.Random) -> None:
    """Another file of the same size."""
    data[:] = rng.randbytes(len(data))


ALL: dict[str, Bytes] = {
    "zero": zero, "cut": cut, "cut-one": cut_one, "longer": longer, "exchange": exchange, "nothing": nothing, "garbage": garbage,
}  # fmt: skip


def changed(file: str, change: Bytes, seed: int, remembered: bool = False) -> Callable[[Place], None]:
    """Changes a file.

    Args:
        file: Its name.
        change: What is done.
        seed: Where.
        remembered: Open the folder first, so that digests are known, write in place, and put the time of the change back.
    """

    def make(place: Place) -> None:
        path = place.model / file
        if remembered:
            surgery.check(place.model)
        before, data = path.stat(), bytearray(path.read_bytes())
        change(data, random.Random(f"{file} {seed}"))
        write_in_place(path, data)
        if remembered:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    return make


def write_in_place(path: Path, data: bytes) -> None:
    """Overwrites a file; its inode stays."""
    with path.open("r+b") as file:
        file.truncate(len(data))
        file.write(data)


def graph_bytes(count: int) -> Variants:
    """Variants of the bytes of model.onnx: 500 flipped bits and more."""
    yield from _bytes(count, MODEL, "graph")


def _bytes(count: int, file: str, part: str) -> Variants:
    made = 0
    for seed in range(count):
        for name, change in [*([("flip", flip)] * 8), *ALL.items()]:
            if made == count:
                return
            remembered = made % 3 == 2
            mark = "-remembered" if remembered else ""
            yield Variant(
                f"{name}-{made:04}{mark}", changed(file, change, seed * 100 + made, remembered), "refused", part
            )
            made += 1


# The header of a safetensors file


def _header(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Place], None]:
    """Changes the header of the weights file, the tensors' bytes as they were."""

    def make(place: Place) -> None:
        path = place.model / WEIGHTS
        table, body = _header(path.read_bytes())
        before = json.dumps(table)
        change(table)
        if json.dumps(table) == before:
            raise HarnessError("this variant is the untouched file")
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)

    return make


def raw_header(text: bytes, length: int | None = None) -> Callable[[Place], None]:
    """Puts other bytes in the header's place."""

    def make(place: Place) -> None:
        path = place.model / WEIGHTS
        _, body = _header(path.read_bytes())
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)

    return make


def _first(table: dict[str, Any]) -> dict[str, Any]:
    """The description of the first tensor."""
    found: dict[str, Any] = next(entry for name, entry in table.items() if name != "__metadata__")
    return found


def _oblong(table: dict[str, Any]) -> dict[str, Any]:
    """The description of the first matrix of two different sizes."""
    found: dict[str, Any] = next(
        entry for name, entry in table.items() if name != "__metadata__" and len(set(entry["shape"])) == 2
    )
    return found


def _swap_two(table: dict[str, Any]) -> None:
    """Two tensors of one shape exchange their places."""
    seen: dict[str, dict[str, Any]] = {}
    for name, entry in table.items():
        if name == "__metadata__":
            continue
        other = seen.setdefault(str(entry["shape"]), entry)
        if other is not entry:
            entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
            return


def _sparse(place: Place) -> None:
    """A file of 100 GB that takes no room."""
    os.truncate(place.model / WEIGHTS, 100 << 30)


def weights_bytes(count: int) -> Variants:
    """Variants of the weights file: its header first, then bytes anywhere."""
    made = [
        Variant("header-swapped", header(_swap_two), "refused", "weights"),
        Variant("header-dtype", header(lambda t: _first(t).update(dtype="I32")), "refused", "weights"),
        Variant("header-dtype-unknown", header(lambda t: _first(t).update(dtype="Q7")), "refused", "weights"),
        Variant("header-dtype-number", header(lambda t: _first(t).update(dtype=7)), "refused", "weights"),
        Variant("header-dtype-list", header(lambda t: _first(t).update(dtype=["F32"])), "refused", "weights"),
        Variant("header-shape", header(lambda t: _oblong(t)["shape"].reverse()), "refused", "weights"),
        Variant("header-shape-text", header(lambda t: _first(t).update(shape="4")), "refused", "weights"),
        Variant("header-shape-huge", header(lambda t: _first(t).update(shape=[2**62, 2**62])), "refused", "weights"),
        Variant("header-offsets", header(lambda t: _first(t).update(data_offsets=[4, 8])), "refused", "weights"),
        Variant("header-offsets-three", header(lambda t: _first(t).update(data_offsets=[0, 4, 8])), "refused", "weights"),
        Variant("header-offsets-beyond", header(lambda t: _first(t).update(data_offsets=[0, 2**62])), "refused", "weights"),
        Variant("header-offsets-text", header(lambda t: _first(t).update(data_offsets=["0", "4"])), "refused", "weights"),
        Variant("header-offsets-true", header(lambda t: _first(t).update(data_offsets=[False, True])), "refused", "weights"),
        Variant("header-less", header(lambda t: t.pop(next(n for n in t if n != "__metadata__"))), "refused", "weights"),
        Variant("header-more", header(lambda t: t.update(x=_first(t))), "refused", "weights"),
        Variant("header-list", raw_header(b"[]      "), "refused", "weights"),
        Variant("header-text", raw_header(b'"x"     '), "refused", "weights"),
        Variant("header-null", raw_header(b'{"x":null}'), "refused", "weights"),
        Variant("header-not-utf-8", raw_header(b'{"\xff":{}}'), "refused", "weights"),
        Variant("header-nested", raw_header(b"[" * 200_000), "refused", "weights"),
        Variant("header-length-0", raw_header(b"", 0), "refused", "weights"),
        Variant("header-length-huge", raw_header(b"{}", 2**63), "refused", "weights"),
        Variant("header-length-99M", raw_header(b"{}", 99_000_000), "refused", "weights"),
        Variant("header-metadata", header(lambda t: t.update(__metadata__={"format": "other"})), "refused", "weights"),
        Variant("sparse-100GB", _sparse, "refused", "weights"),
    ]  # fmt: skip
    yield from made[:count]
    yield from _bytes(count - len(made), WEIGHTS, "weights")
