"""Weights of a graph that lie elsewhere, in memory or in another folder's file, until the graph is written."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from graphlens.file.safetensors import Array


class HeldTensor(ir.ExternalTensor):
    """An initializer's data over an array that somebody else holds, or has mapped. Nothing of it is copied into a graph.

    Sessions are given the array itself. ``surgery.held_weights`` writes it into a file when the graph gets a folder.

    Args:
        array: The numbers, float32. They are not changed while the tensor is there.
        name: The initializer's name.
        file: What the file is called that gets it.

    Attributes:
        held: The array, contiguous.
    """

    __slots__ = ("held",)

    def __init__(self, array: Array, name: str, file: str) -> None:
        self.held = np.ascontiguousarray(array)
        super().__init__(
            file, 0, self.held.nbytes, ir.DataType.from_numpy(self.held.dtype), shape=ir.Shape(array.shape), name=name
        )

    def numpy(self) -> Array:
        """The array."""
        return self.held

    def __array__(self, dtype: np.dtype[np.generic] | None = None, copy: bool | None = None) -> Array:
        return np.array(self.held, dtype) if copy else np.asarray(self.held, dtype)

    def tobytes(self) -> bytes:
        """A copy of its bytes."""
        return self.held.tobytes()


def held(model: ir.Model) -> Iterator[tuple[ir.Value, HeldTensor]]:
    """The initializers of a model whose data lie elsewhere.

    Args:
        model: A model. An initializer may be bound to another tensor meanwhile.

    Yields:
        An initializer, and its tensor.
    """
    for value in list(model.graph.initializers.values()):
        if isinstance(value.const_value, HeldTensor):
            yield value, value.const_value


def held_arrays(model: ir.Model) -> dict[str, Array]:
    """What lies elsewhere of a model's initializers: name -> array."""
    return {str(value.name): tensor.held for value, tensor in held(model)}
