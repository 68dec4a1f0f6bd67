"""How much memory a graph's values take, as far as its shapes say so: found from shapes alone, nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from graphlens.errors import ModelFileError
from graphlens.file.stored import path_of
from graphlens.surgery.known import SMALL, UNKNOWN, Attributes, Call, Known
from graphlens.surgery.shape_rules import outputs_of

ALLOWANCE = 1 << 30  # bytes that the values of a short run may have, besides ...
PER_WEIGHT_BYTE = 8  # ... so many for each byte of the weights, which graphs cast, transpose and cut
# A short run: two prompts of five tokens, three earlier ones in a KV cache.
_NOMINAL = {"batch": 2, "sequence": 5, "past_sequence": 3, "total_sequence": 8}
_OTHER = 5  # any other size that only a run knows
_NUMBERS = "biuf"  # NumPy's kinds of dtypes whose content is followed
_WHOLE = "biu"
_LISTS = {
    **dict.fromkeys((ir.AttributeType.INT, ir.AttributeType.INTS), np.int64),
    **dict.fromkeys((ir.AttributeType.FLOAT, ir.AttributeType.FLOATS), np.float32),
}


def short_shape(value: ir.Value, nominal: Mapping[str, int] = MappingProxyType({})) -> tuple[int, ...]:
    """The shape of an input in a short run.

    Args:
        value: An input of a graph.
        nominal: Sizes by their names, where others than a short run's are wanted.
    """
    sizes, given = value.shape if value.shape is not None else (), {**_NOMINAL, **nominal}
    return tuple(max(0, size) if isinstance(size, int) else given.get(str(size), _OTHER) for size in sizes)


def check_sizes(model: ir.Model, file: Path, weights: int) -> None:
    """Refuses a graph whose values would take far more memory than its weights, at a prompt of a few tokens.

    What depends on the content of activations stays unknown and is not counted.

    Args:
        model: A model whose operators, functions and tensors have been checked.
        file: The graph file that it came from.
        weights: The bytes of the model's tensors.

    Raises:
        ModelFileError: The values are too large; the one with which they become so is named.
    """
    Sizes(model, file, ALLOWANCE + PER_WEIGHT_BYTE * weights)


class Sizes:
    """One pass over a graph, its branches and the functions that it calls.

    Args:
        model: See ``check_sizes``.
        file: See there.
        allowed: The bytes that all values may have together.
        nominal: See ``short_shape``.
        exact: True where a shape is to be right or unknown; False where the largest that it may be will do.
        fed: True if inputs that a run may leave out are fed too, so that their defaults tell nothing.

    Attributes:
        known: What is known of each value of the graph and of its branches.
        total: The bytes of all of them and of those in functions.

    Raises:
        ModelFileError: They come to more than is allowed.
    """

    def __init__(
        self,
        model: ir.Model,
        file: Path,
        allowed: int,
        nominal: Mapping[str, int] = MappingProxyType({}),
        exact: bool = False,
        fed: bool = False,
    ) -> None:
        self._model, self._file, self._allowed, self._exact = model, file, allowed, exact
        self.total = 0
        self.known: dict[ir.Value, Known] = {
            value: Known(short_shape(value, nominal), _width(value.dtype))
            for value in model.graph.inputs
            if fed or value.const_value is None
        }
        with np.errstate(all="ignore"):
            self._walk(model.graph, self.known, {})

    def _walk(self, nodes: Iterable[ir.Node], known: dict[ir.Value, Known], given: Attributes) -> None:
        """Goes through nodes in their order; ``given`` holds the attributes of the function call that they are in."""
        for node in nodes:
            inputs = [None if value is None else self._known(value, known) for value in node.inputs]
            for value, found in zip(node.outputs, self._outputs(node, inputs, known, given), strict=False):
                known[value] = found
                self.total += found.bytes
                if self.total > self._allowed:
                    raise ModelFileError(
                        f"{self._file}: the value {value.name!r} would have {found.bytes:,} bytes in a run of "
                        f"{_NOMINAL['sequence']} tokens, and all values up to it {self.total:,}. graphlens opens files in which "
                        f"they come to at most {self._allowed:,}, by the size of their weights."
                    )

    def _outputs(
        self, node: ir.Node, inputs: list[Known | None], known: dict[ir.Value, Known], given: Attributes
    ) -> list[Known]:
        """What is known of a node's outputs."""
        attributes = _attributes(node, given) if given else node.attributes
        functions = self._model.functions
        function = functions.get(node.op_identifier()) if functions else None
        if function is not None:
            inner = dict(zip(function.inputs, (UNKNOWN if each is None else each for each in inputs), strict=False))
            self._walk(function, inner, {**function.attributes, **attributes})
            return [inner.get(value, UNKNOWN) for value in function.outputs]
        if node.op_type == "Constant":
            return [_constant(attributes)]
        if node.op_type in ("If", "Loop", "Scan") and self._exact:
            return [UNKNOWN] * len(node.outputs)
        if node.op_type == "If":
            branches = [branch.as_graph() for branch in attributes.values() if branch.type == ir.AttributeType.GRAPH]
            for branch in branches:
                self._walk(branch, known, given)
            ends = zip(*([self._known(value, known) for value in branch.outputs] for branch in branches), strict=False)
            return [max(end, key=lambda found: found.bytes) for end in ends]
        return outputs_of(Call(node.op_type, inputs, attributes, len(node.outputs), self._exact))

    def _known(self, value: ir.Value, known: dict[ir.Value, Known]) -> Known:
        """What is known of a value; a weight's content is looked at where it is small."""
        if value not in known:
            known[value] = UNKNOWN if value.const_value is None else _tensor(value.const_value)
        return known[value]


def _attributes(node: ir.Node, given: Attributes) -> Attributes:
    """A node's attributes; in a function some are those of its call."""
    found = {}
    for name, attribute in node.attributes.items():
        if not attribute.is_ref():
            found[name] = attribute
        elif (taken := attribute.ref_attr_name or "") in given:
            found[name] = given[taken]
    return found


def _width(dtype: ir.DataType | None) -> float:
    """The bytes of an element."""
    return 8 if dtype in (None, ir.DataType.UNDEFINED, ir.DataType.STRING) else dtype.itemsize


def _tensor(tensor: ir.TensorProtocol) -> Known:
    """What is known of a constant tensor."""
    shape = tuple(int(str(size)) for size in tensor.shape)
    count, dtype, data = math.prod(shape), tensor.dtype.numpy(), None
    try:
        if count > SMALL or dtype.kind not in _NUMBERS:
            pass
        elif not isinstance(tensor, ir.ExternalTensor):
            data = tensor.numpy()
        elif count == 1 or dtype.kind in _WHOLE:  # biases and norms are not read
            data = np.fromfile(path_of(tensor), dtype, count, offset=int(tensor.offset or 0)).reshape(shape)
    except (ValueError, TypeError, OSError):  # content that does not fit its shape: ONNX Runtime refuses the file
        data = None
    return Known(shape, _width(tensor.dtype), data)


def _constant(attributes: Mapping[str, ir.Attr]) -> Known:
    """What is known of a Constant's output."""
    for attribute in attributes.values():
        kind = attribute.type
        if kind == ir.AttributeType.TENSOR:
            return _tensor(attribute.value)  # as_tensor, which looks at the whole protocol, takes most of the time here
        if kind in _LISTS:
            data = np.asarray(attribute.value, _LISTS[kind])
            return Known(data.shape, data.itemsize, data if data.size <= SMALL else None)
    return UNKNOWN
