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
        zero_point: That of the zero points; None for 0, and for half the range where integers lie in blocks without ``axis``.
        axis: The axis that scales belong to; None for one scale, and for the rows of ``MatMulNBits``.
        bits: 8, or 4 or 2 where a byte holds several, the lowest bits first.
        block: How many numbers along the axis, or along a row, share a scale; None where they do not lie in blocks.
    """

    scale: str
    zero_point: str | None = None
    axis: int | None = None
    bits: int = 8
    block: int | None = None

    def check(self) -> None:
        """Raises ValueError or TypeError for what no quantiser writes, as a stranger's manifest may."""
        keys = (self.scale, *([] if self.zero_point is None else [self.zero_point]))
        if not all(isinstance(key, str) for key in keys):
            raise TypeError(f"the scales' tensors are {keys!r}")
        numbers = [number for number in (self.axis, self.block) if number is not None]
        if self.bits not in (2, 4, 8) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"no quantiser writes {self}")
        if self.block == 0:
            raise ValueError("blocks of 0 numbers")


def unpacked(array: Stored, bits: int) -> Stored:
    """Integers that share bytes, each in a byte of its own.

    Args:
        array: uint8 [..., n].
        bits: How many bits each has.

    Returns:
        uint8 [..., n * 8 / bits]; the array itself for 8 bits.
    """
    if bits == 8:
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
        float32, of the integers' shape; [rows, blocks * block] for ``MatMulNBits``.

    Raises:
        ValueError: The shapes do not fit each other.
    """
    values = unpacked(integers, how.bits)
    if how.block is not None and how.axis is None:
        return _of_rows(values, how, scale, zero_point)
    scales = scale.astype(np.float32)
    zeros = np.zeros((), np.float32)
    if zero_point is not None:
        packed = how.bits < 8 and zero_point.dtype == np.uint8 and zero_point.shape != scale.shape
        zeros = (unpacked(zero_point, how.bits) if packed else zero_point).astype(np.float32)
    if how.block is not None and how.axis is not None:
        size = values.shape[how.axis]
        scales = np.repeat(scales, how.block, how.axis).take(range(size), how.axis)
        zeros = np.repeat(zeros, how.block, how.axis).take(range(size), how.axis) if zeros.ndim else zeros
    elif how.axis is not None and scales.size > 1:
        along = [1] * values.ndim
        along[how.axis] = -1
        scales = scales.reshape(along)
        zeros = zeros.reshape(along) if zeros.size > 1 else zeros.reshape(())
    else:
        scales, zeros = scales.reshape(()), zeros.reshape(())
    found: Numbers = (values.astype(np.float32) - zeros) * scales
    return found


def _of_rows(values: Stored, how: Quantisation, scale: Stored, zero_point: Stored | None) -> Numbers:
    """The numbers of ``MatMulNBits``: integers [rows, blocks, block], a scale and a zero point for each block."""
    rows, blocks = values.shape[:2]
    zeros = np.full((rows, blocks, 1), 1 << (how.bits - 1), np.float32)
    if zero_point is not None:
        apart = zero_point if zero_point.dtype.kind == "f" else unpacked(zero_point.reshape(rows, -1), how.bits)
        zeros = apart.reshape(rows, -1)[:, :blocks, None].astype(np.float32)
    numbers: Numbers = (values.astype(np.float32) - zeros) * scale.reshape(rows, blocks, 1).astype(np.float32)
    return numbers.reshape(rows, -1)
