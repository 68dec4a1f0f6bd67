"""The first call of a Python operator in a process, made where no signal handler can interrupt it.

What this module alone knows: that onnxruntime-extensions imports modules of NumPy in its first call, after ours has answered.
What a signal handler raises in that import would abort the process. The model is made of protobuf's bytes: nothing here may
need the onnx package.
"""

from __future__ import annotations

import numpy as np

from graphlens.runtime.sessions import open_session

_FLOAT, _INT64, _INT = 1, 7, 2  # onnx.TensorProto.FLOAT, INT64; onnx.AttributeProto.INT


def _varint(number: int) -> bytes:
    """A number below 16384 as protobuf writes it."""
    return bytes((number,)) if number < 128 else bytes((number & 127 | 128, number >> 7))


def _field(number: int, value: int | str | bytes) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _tensor(name: str, dtype: int) -> bytes:
    """A ValueInfoProto: a scalar."""
    return _field(1, name) + _field(2, _field(1, _field(1, dtype) + _field(2, b"")))


def _model() -> bytes:
    """A model of one call."""
    attribute = _field(1, "index") + _field(3, 0) + _field(20, _INT)
    node = b"".join(
        (
            _field(1, "x"),
            _field(1, "run"),
            _field(2, "y"),
            _field(4, "GraphlensHookFloat"),
            _field(5, attribute),
            _field(7, "ai.onnx.contrib"),
        )
    )
    inputs = _field(11, _tensor("x", _FLOAT)) + _field(11, _tensor("run", _INT64))
    graph = _field(1, node) + _field(2, "first") + inputs + _field(12, _tensor("y", _FLOAT))
    opsets = _field(8, _field(2, 17)) + _field(8, _field(1, "ai.onnx.contrib") + _field(2, 1))
    return _field(1, 8) + _field(7, graph) + opsets


def make_first_call(library: str) -> None:
    """Makes the call. The thread that this is called in must not be the main thread.

    Args:
        library: The library with the Python operators.
    """
    session = open_session(
        _model(), "cpu", custom_ops=library, one_of_many=True, name="the first call of a Python hook"
    )
    session.run(["y"], {"x": np.asarray(0, np.float32), "run": np.asarray(0, np.int64)})
