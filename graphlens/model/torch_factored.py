"""FactoredMatrix with tensors in and out, which carry gradients as torch's own do."""

from __future__ import annotations

from typing import ClassVar, cast

import numpy as np
import torch

from graphlens.analysis import factored_matrix
from graphlens.analysis.arrays import Array, ArrayInput, as_array, working
from graphlens.analysis.matrix_ops import MatrixOps
from graphlens.model.torch_weight import Weight


class TorchOps:
    """torch's operations; see MatrixOps. Tensors go by the type Array here, whose operators they have."""

    def read(self, value: object) -> Array:
        """A tensor, or what multiplies like one, as it is; of an array or a list a tensor, over its memory where it can be."""
        if isinstance(value, torch.Tensor) or (hasattr(value, "unsqueeze") and not isinstance(value, np.ndarray)):
            return cast(Array, value)
        array = working(as_array(cast(ArrayInput, value)))
        # A factor that is a weight can only be read.
        return cast(Array, torch.from_numpy(array) if array.flags.writeable else Weight.of(array))

    def broadcast(self, array: Array, shape: tuple[int, ...]) -> Array:
        """See MatrixOps."""
        return cast(Array, _tensor(array).broadcast_to(shape))

    def product(self, left: Array, right: Array) -> Array:
        """See MatrixOps; of two dtypes in the wider one."""
        if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor) and left.dtype != right.dtype:
            dtype = torch.promote_types(left.dtype, right.dtype)
            return cast(Array, left.to(dtype) @ right.to(dtype))
        return left @ right

    def scaled(self, array: Array, number: object) -> Array:
        """See MatrixOps."""
        if isinstance(number, torch.Tensor):
            return cast(Array, _tensor(array) * number.reshape(()).to(_tensor(array).dtype))
        return cast(Array, _tensor(array) * as_array(cast(ArrayInput, number)).item())

    def transposed(self, array: Array) -> Array:
        """See MatrixOps."""
        return cast(Array, _tensor(array).transpose(-2, -1))

    def unsqueeze(self, array: Array, axis: int) -> Array:
        """See MatrixOps."""
        return cast(Array, _tensor(array).unsqueeze(axis))

    def squeeze(self, array: Array, axis: int) -> Array:
        """See MatrixOps."""
        return cast(Array, _tensor(array).squeeze(axis))

    def root(self, array: Array) -> Array:
        """See MatrixOps."""
        return cast(Array, _tensor(array).sqrt())

    def svd(self, array: Array) -> tuple[Array, Array, Array]:
        """See MatrixOps; of half precision in float32."""
        left, values, right = torch.linalg.svd(_wide(array), full_matrices=False)
        return cast(Array, left), cast(Array, values), cast(Array, right)

    def eigenvalues(self, array: Array) -> Array:
        """See MatrixOps; of half precision in float32."""
        return cast(Array, torch.linalg.eigvals(_wide(array)))

    def leading(self, array: Array, index: tuple[object, ...]) -> Array:
        """See MatrixOps. A view where the index is of integers, None and slices, as torch's own indices are."""
        tensor = _tensor(array)
        if all(item is None or isinstance(item, int) or _steps_forward(item) for item in index):
            return cast(Array, tensor[index])
        places = np.arange(tensor.shape[:-2].numel()).reshape(tuple(tensor.shape[:-2]))[index]  # type: ignore[index]
        flat = tensor.reshape(-1, *tensor.shape[-2:])
        return cast(Array, flat[torch.from_numpy(np.ascontiguousarray(places)).to(tensor.device)])

    def along(self, array: Array, axis: int, item: slice | Array) -> Array:
        """See MatrixOps. A view where the item is a slice."""
        tensor = _tensor(array)
        if _steps_forward(item):
            return cast(Array, tensor[(..., item) if axis == -1 else (..., item, slice(None))])
        places = np.ascontiguousarray(np.arange(tensor.shape[axis])[item])
        return cast(Array, tensor.index_select(axis, torch.from_numpy(places).to(tensor.device)))


class FactoredMatrix(factored_matrix.FactoredMatrix):
    """A product of two matrices, never multiplied out unless ``AB`` is asked for (TransformerLens: ``FactoredMatrix``).

    graphlens's FactoredMatrix over tensors: they keep their dtype, their device and their gradients.

    Args:
        A: The left factor [..., l, m].
        B: The right factor [..., m, r]. Leading axes broadcast.

    Raises:
        InputError: For factors whose shapes do not fit.
    """

    _ops: ClassVar[MatrixOps] = TorchOps()

    def __init__(self, A: ArrayInput, B: ArrayInput) -> None:  # noqa: N803
        super().__init__(A, B)
        self.shape = torch.Size(self.shape)


def _tensor(array: Array) -> torch.Tensor:
    """What goes by the type Array here, by what it is."""
    return cast(torch.Tensor, array)


def _wide(array: Array) -> torch.Tensor:
    """A tensor in a precision that torch decomposes matrices in."""
    tensor = _tensor(array)
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _steps_forward(item: object) -> bool:
    """True for a slice that torch takes: torch has none with a negative step."""
    return isinstance(item, slice) and (item.step is None or item.step > 0)
