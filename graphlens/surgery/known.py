"""What is known of a graph's values without running it: shapes, and the content of small tensors that become shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Shape = tuple[int, ...]
Data = npt.NDArray[np.generic]
SMALL = 1 << 10  # elements of a tensor whose content is followed


@dataclass(frozen=True)
class Known:
    """What is known of a value.

    Attributes:
        shape: Its sizes; None if not known.
        width: The bytes of an element.
        data: Its content, where it is small and known.
    """

    shape: Shape | None = None
    width: float = 8
    data: Data | None = None

    @property
    def bytes(self) -> int:
        """Its size; 0 if not known."""
        return 0 if self.shape is None else math.ceil(self.width * math.prod(self.shape))


UNKNOWN = Known()
Attributes = Mapping[str, ir.Attr]


class Unfit(ValueError):
    """The inputs of a node do not fit its operator, or too little is known of them."""


@dataclass(frozen=True)
class Call:
    """A node with what is known of its inputs; an optional input that is left out is None.

    Attributes:
        operator: Its operator.
        inputs: Its inputs.
        attributes: Its attributes, those of a function's call put in.
        outputs: How many outputs it has.
        exact: True where a shape is to be right or unknown; False where the largest that it may be will do.
    """

    operator: str
    inputs: Sequence[Known | None]
    attributes: Attributes
    outputs: int
    exact: bool = False

    def shape(self, index: int = 0) -> Shape:
        """The shape of an input."""
        given = self.inputs[index] if index < len(self.inputs) else None
        if given is None or given.shape is None:
            raise Unfit
        return given.shape

    def width(self, index: int = 0) -> float:
        """The bytes of an element of an input."""
        given = self.inputs[index] if index < len(self.inputs) else None
        return 8 if given is None else given.width

    def at_most(self) -> None:
        """Says that the shape found is the largest that it may be. Raises Unfit where it is to be exact."""
        if self.exact:
            raise Unfit

    def given(self, index: int) -> bool:
        """True if an optional input is there."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def data(self, index: int) -> Data:
        """The content of an input."""
        found = self.inputs[index] if index < len(self.inputs) else None
        if found is None or found.data is None:
            raise Unfit
        return found.data

    def numbers(self, index: int, name: str = "", default: Sequence[int] | None = None) -> list[int]:
        """Integers that are an input or, in older versions of an operator, an attribute."""
        if self.given(index):
            return [int(number) for number in self.data(index).reshape(-1)]
        if name in self.attributes:
            return list(self.attributes[name].as_ints())
        if default is None:
            raise Unfit
        return list(default)

    def integer(self, name: str, default: int) -> int:
        """An attribute that is an integer."""
        return self.attributes[name].as_int() if name in self.attributes else default


def broadcast(*shapes: Shape) -> Shape:
    """The shape that several broadcast to.

    Args:
        shapes: The shapes.
    """
    rank = max(len(shape) for shape in shapes)
    return tuple(max(sizes) for sizes in zip(*((1,) * (rank - len(shape)) + shape for shape in shapes), strict=True))


def axis_of(axis: int, rank: int) -> int:
    """The place of an axis counted from either end.

    Args:
        axis: The axis.
        rank: How many there are.
    """
    if not -rank <= axis < rank:
        raise Unfit
    return axis % rank


def made(shape: Sequence[int], width: float, data: Callable[[], Data] | None = None) -> list[Known]:
    """One output, with its content where it is small and its inputs' is known.

    Args:
        shape: The output's shape.
        width: The bytes of an element.
        data: Computes its content; raises Unfit where an input's is not known.
    """
    sizes = tuple(int(size) for size in shape)
    if min(sizes, default=0) < 0:
        raise Unfit
    content = None
    if data is not None and math.prod(sizes) <= SMALL:
        try:
            content = data()
        except Unfit:
            content = None
    return [Known(sizes, width, content)]
