"""The seal: a digest of a graph file, in the file itself, by which damage to it is found."""

from __future__ import annotations

import hashlib
import re

import onnx

from graphlens.errors import ModelFileError

KEY = "graphlens.seal"
"""Where a file's metadata hold its seal."""
_METHOD, _DIGITS = "sha256:", 64
_BLANK = _METHOD + "0" * _DIGITS
# As protobuf stores it: the key, then the tag and the length of the value.
_STORED = re.compile(re.escape(KEY.encode()) + rb"\x12\x47" + _METHOD.encode() + rb"([0-9a-f]{64})")


def sealed_bytes(proto: onnx.ModelProto) -> bytes:
    """The bytes of a graph file with its seal.

    Args:
        proto: The graph. A seal that it has is replaced, in place.
    """
    for index in reversed(range(len(proto.metadata_props))):
        if proto.metadata_props[index].key == KEY:
            del proto.metadata_props[index]
    entry = proto.metadata_props.add()
    entry.key, entry.value = KEY, _BLANK
    data: bytes = proto.SerializeToString(deterministic=True)
    place = _place(data)
    assert place is not None, "the seal that was just added"
    return data[: place[0]] + _digest(data, place).encode() + data[place[1] :]


def is_sealed(data: bytes, where: str) -> bool:
    """Whether a graph file has a seal, once it is known that the seal fits if there is one.

    Args:
        data: The file's content.
        where: What an error calls the file.

    Raises:
        ModelFileError: The seal does not fit the content.
    """
    place = _place(data)
    if place is None:
        return False
    if data[slice(*place)].decode() != _digest(data, place):
        raise ModelFileError(
            f"{where}: this file is not as it was written: its digest differs from its seal. Put the original back or "
            "export the model again. If you changed it yourself: graphlens seal FOLDER checks it and seals it anew."
        )
    return True


def _place(data: bytes) -> tuple[int, int] | None:
    """Where a file's content holds the digits of its seal; the last place, should its weights hold such bytes too."""
    places = [match.span(1) for match in _STORED.finditer(data)]
    return places[-1] if places else None


def _digest(data: bytes, place: tuple[int, int]) -> str:
    """The SHA-256 of a file's content with the digits of its seal blanked."""
    digest = hashlib.sha256(memoryview(data)[: place[0]])
    digest.update(b"0" * _DIGITS)
    digest.update(memoryview(data)[place[1] :])
    return digest.hexdigest()
