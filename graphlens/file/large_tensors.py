"""A graph file without the bytes of its large tensors, which are left in the file and told by their place there.

Reading an ONNX file of a gigabyte as protobuf takes two of memory. What it says besides its weights is a few hundred
kilobytes: this finds where each tensor's bytes lie, by protobuf's wire format alone, and reads the rest.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from graphlens.file.inside import open_regular

LEAST = 1 << 12  # bytes of a tensor that is left in the file
_PIECE = 1 << 22  # bytes that are copied at once
# Fields of ONNX's messages, by their numbers in onnx.proto.
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_RAW, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 7, 5, 9, 13, 14
_ENTRY_KEY, _ENTRY_VALUE, _GRAPH_OUTPUT = 1, 2, 12
_EXTERNAL = 1  # TensorProto.DataLocation
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class _Field(NamedTuple):
    """One field of a message: its number, its wire type, and where the field, its content and its end are."""

    number: int
    kind: int
    start: int
    content: int
    end: int


def light_bytes(path: Path) -> bytes:
    """The content of a graph file in which large initializers of the main graph are external data in the file itself.

    Args:
        path: The graph file.

    Returns:
        A serialised ModelProto. Where the file is no protobuf message of that form, its content as it is: whoever parses
        it says what is wrong.

    Raises:
        ModelFileError: It is no regular file.
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        if path.stat().st_size < LEAST:
            return file.read()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _light_model(data, path.name)
            except ValueError:
                return data[:]


def copy_with(path: Path, target: Path, addition: bytes) -> None:
    """Writes a copy of a graph file whose graph has more fields at its end. No more of it is held in memory than a piece.

    Args:
        path: The graph file.
        target: The copy.
        addition: Fields of a GraphProto, serialised.

    Raises:
        ValueError: The file is no protobuf message of that form, or has two graphs.
        OSError: It cannot be read or written.
    """
    with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        graphs = [field for field in _fields(data, 0, len(data)) if field.number == _MODEL_GRAPH]
        if len(graphs) != 1 or graphs[0].kind != _BYTES:
            raise ValueError(f"{len(graphs)} graphs")
        (graph,) = graphs
        size = graph.end - graph.content + len(addition)
        with target.open("wb") as copy:
            _copy(data, 0, graph.start, copy)
            copy.write(_varint(_MODEL_GRAPH << 3 | _BYTES) + _varint(size))
            _copy(data, graph.content, graph.end, copy)
            copy.write(addition)
            _copy(data, graph.end, len(data), copy)


def _copy(data: mmap.mmap, start: int, end: int, copy: BinaryIO) -> None:
    """Writes a stretch of a file, piece by piece."""
    for at in range(start, end, _PIECE):
        copy.write(data[at : min(at + _PIECE, end)])


def graph_outputs(values: Iterable[bytes]) -> bytes:
    """Outputs as fields of a GraphProto.

    Args:
        values: A serialised ValueInfoProto for each.
    """
    return b"".join(_framed(_GRAPH_OUTPUT, value) for value in values)


def _light_model(data: mmap.mmap, name: str) -> bytes:
    """A ModelProto without its large tensors. Raises ValueError for what is none, or has two graphs."""
    parts, graphs = [], 0
    for field in _fields(data, 0, len(data)):
        if field.number == _MODEL_GRAPH and field.kind == _BYTES:
            graphs += 1
            parts.append(_framed(_MODEL_GRAPH, _light_graph(data, field, name)))
        else:
            parts.append(data[field.start : field.end])
    if graphs != 1:
        raise ValueError(f"{graphs} graphs")
    return b"".join(parts)


def _light_graph(data: mmap.mmap, graph: _Field, name: str) -> bytes:
    """A GraphProto without its large tensors."""
    parts = []
    for field in _fields(data, graph.content, graph.end):
        if field.number == _GRAPH_INITIALIZER and field.kind == _BYTES and field.end - field.content >= LEAST:
            parts.append(_framed(_GRAPH_INITIALIZER, _light_tensor(data, field, name)))
        else:
            parts.append(data[field.start : field.end])
    return b"".join(parts)


def _light_tensor(data: mmap.mmap, tensor: _Field, name: str) -> bytes:
    """A TensorProto whose bytes are external data in the file; as it is where they are small or elsewhere."""
    parts, raw = [], list[_Field]()
    for field in _fields(data, tensor.content, tensor.end):
        if field.number in (_TENSOR_EXTERNAL, _TENSOR_LOCATION):
            return data[tensor.content : tensor.end]
        if field.number == _TENSOR_RAW and field.kind == _BYTES:
            raw.append(field)
        else:
            parts.append(data[field.start : field.end])
    if len(raw) != 1 or raw[0].end - raw[0].content < LEAST:
        return data[tensor.content : tensor.end]
    place = {"location": name, "offset": str(raw[0].content), "length": str(raw[0].end - raw[0].content)}
    for key, value in place.items():
        entry = _framed(_ENTRY_KEY, key.encode()) + _framed(_ENTRY_VALUE, value.encode())
        parts.append(_framed(_TENSOR_EXTERNAL, entry))
    parts.append(_varint(_TENSOR_LOCATION << 3 | _VARINT) + _varint(_EXTERNAL))
    return b"".join(parts)


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[_Field]:
    """The fields of a message between two places. Raises ValueError where they do not fit."""
    at = start
    while at < end:
        tag, content = _read_varint(data, at, end)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            _, after = _read_varint(data, content, end)
        elif kind == _BYTES:
            length, content = _read_varint(data, content, end)
            after = content + length
        elif kind in (_FIXED64, _FIXED32):
            after = content + (8 if kind == _FIXED64 else 4)
        else:
            raise ValueError(f"wire type {kind}")
        if after > end or number == 0:
            raise ValueError("a field beyond its message")
        yield _Field(number, kind, at, content, after)
        at = after


def _read_varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """(a number, the place after it)."""
    number = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return number, at
        shift += 7
    raise ValueError("a number without end")


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def _framed(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content
