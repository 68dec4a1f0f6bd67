"""How integers in a weights file become the numbers that they stand for: scales, zero points, packed bits, blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float32]
Stored = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Quantisation:
    """What integers mean: ``(integer - zero point) * scale``.

    Attributes:
        scale: The key of the scales' tensor in the same file: [] or [n], or one for each block.
        zero_point: That of the zero points; None for 0, and for half the range where bytes hold several integers.
        axis: The axis that scales belong to; None for one scale.
        bits: 8, 16 or 32 (biases), or 4 or 2 where a byte holds several, the lowest bits first.
        block: How many numbers along an axis share a scale; None where they do not lie in blocks.
        columns: How many numbers a row has, where its last block is not full; None for all of the blocks.
    """

    scale: str
    zero_point: str | None = None
    axis: int | None = None
    bits: int = 8
    block: int | None = None
    columns: int | None = None

    def check(self) -> None:
        """Raises ValueError or TypeError for what no quantiser writes, as a stranger's manifest may."""
        keys = (self.scale, *([] if self.zero_point is None else [self.zero_point]))
        if not all(isinstance(key, str) for key in keys):
            raise TypeError(f"the scales' tensors are {keys!r}")
        numbers = [number for number in (self.axis, self.block, self.columns) if number is not None]
        if self.bits not in (2, 4, 8, 16, 32) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"no quantiser writes {self}")
        if self.block == 0:
            raise ValueError("blocks of 0 numbers")


def unpacked(array: Stored, bits: int) -> Stored:
    """Integers that share bytes, each in a byte of its own.

    Args:
        array: uint8 [..., n].
        bits: How many bits each has.

    Returns:
        uint8 [..., n * 8 / bits]; the array itself for 8 bits and more.
    """
    if bits >= 8:
        return array
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    apart = (array.astype(np.uint8)[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return apart.reshape(*array.shape[:-1], -1)


def dequantised(integers: Stored, how: Quantisation, scale: Stored, zero_point: Stored | None) -> Numbers:
    """The numbers that integers stand for.

    Args:
        integers: As they are stored: any shape, or uint8 [rows, blocks, bytes] for ``MatMulNBits``.
        how: What they mean.
        scale: The scales.
        zero_point: The zero points, of the integers' dtype or packed as they are; also as floats.

    Returns:
        float32, of the integers' shape; [rows, columns] for ``MatMulNBits``.

    Raises:
        ValueError: The shapes do not fit each other.
    """
    values = unpacked(integers, how.bits)
    if how.block is not None and (values.ndim == 3 or how.bits < 8):
        return _of_rows(values, how, scale, zero_point)
    scales = scale.astype(np.float32)
    zeros = np.zeros((), np.float32) if zero_point is None else zero_point.astype(np.float32)
    if how.block is not None:
        axis = _blocked(values.shape, scales.shape, how)
        scales, zeros = (_spread(each, how.block, axis, values.shape[axis]) for each in (scales, zeros))
    elif how.axis is not None and scales.size > 1:
        along = [1] * values.ndim
        along[how.axis] = -1
        scales = scales.reshape(along)
        zeros = zeros.reshape(along) if zeros.size > 1 else zeros.reshape(())
    else:
        scales, zeros = scales.reshape(()), zeros.reshape(())
    found: Numbers = values.astype(np.float32)  # of a size that is worth no second copy
    found -= zeros
    found *= scales
    return found


def _blocked(sizes: tuple[int, ...], scales: tuple[int, ...], how: Quantisation) -> int:
    """The axis along which integers lie in blocks, as the scales' sizes tell."""
    assert how.block is not None
    for axis in dict.fromkeys([*([] if how.axis is None else [how.axis]), *reversed(range(len(sizes)))]):
        if axis < len(sizes):
            blocks = -(-sizes[axis] // how.block)
            if scales == (*sizes[:axis], blocks, *sizes[axis + 1 :]):
                return axis
    raise ValueError(f"scales {list(scales)} for blocks of {how.block} in {list(sizes)}")


def _spread(numbers: Numbers, block: int, axis: int, size: int) -> Numbers:
    """A number for each block as one for each entry."""
    return numbers if not numbers.ndim else np.repeat(numbers, block, axis).take(range(size), axis)


def _of_rows(values: Stored, how: Quantisation, scale: Stored, zero_point: Stored | None) -> Numbers:
    """The numbers of ``MatMulNBits`` and ``GatherBlockQuantized``: rows, in blocks with a scale and a zero point each."""
    assert how.block is not None
    rows = values.shape[0]
    flat = values.reshape(rows, -1)
    columns = flat.shape[1] if how.columns is None else how.columns
    blocks = -(-columns // how.block)
    zeros = np.full((rows, blocks), 1 << (how.bits - 1) if values.dtype.kind == "u" else 0, np.float32)
    if zero_point is not None:
        apart = zero_point if zero_point.dtype.kind == "f" else unpacked(zero_point.reshape(rows, -1), how.bits)
        zeros = apart.reshape(rows, -1)[:, :blocks].astype(np.float32)
    scales = scale.reshape(rows, blocks).astype(np.float32)
    wide = (_spread(each, how.block, 1, columns) for each in (zeros, scales))
    zero, factor = wide
    numbers: Numbers = flat[:, :columns].astype(np.float32)
    numbers -= zero
    numbers *= factor
    return numbers
