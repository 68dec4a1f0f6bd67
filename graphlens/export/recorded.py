"""Recording the decoder's forward as a graph in milliseconds, where every module in it is our own.

torch's exporter takes seconds for two layers. ``Recorded`` stands for a tensor in ``Decoder.forward``: what is done with it
becomes nodes. It knows the operations that the decoder uses and refuses any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
import onnx_ir.convenience
import torch
from torch import Tensor, nn
from torch.nn import functional

from graphlens.export.operations import HOOK_DOMAIN
from graphlens.file.io_names import DECODER_INPUTS, INPUT_IDS, LOGITS, POSITIONS
from graphlens.file.safetensors import Array

Size: TypeAlias = "int | str"
Operand: TypeAlias = "Recorded | Tensor | ir.Value | float"
Attribute: TypeAlias = "int | str | Sequence[int]"
_BATCH, _SEQUENCE = "batch", "sequence"
_TYPES: Mapping[torch.dtype, ir.DataType] = {
    torch.float32: ir.DataType.FLOAT, torch.int64: ir.DataType.INT64, torch.bool: ir.DataType.BOOL,
}  # fmt: skip
_SQUARE = (_BATCH, 1, _SEQUENCE, _SEQUENCE)
_KINDS: Sequence[tuple[tuple[Size, ...], torch.dtype]] = (
    ((_BATCH, _SEQUENCE), torch.int64),
    ((_BATCH, _SEQUENCE), torch.int64),
    (_SQUARE, torch.bool),
    ((_BATCH, _SEQUENCE), torch.bool),
    (_SQUARE, torch.bool),
    ((_SEQUENCE, _SEQUENCE), torch.float32),
)
# Of Decoder.forward, in its order.
_INPUTS = dict(zip((INPUT_IDS, *DECODER_INPUTS), _KINDS, strict=True))


def record(decoder: nn.Module, opset: int) -> ir.Model:
    """The graph of a decoder, for any batch and length.

    Args:
        decoder: A ``Decoder`` over modules of our own. Its parameters hold no data; its buffers do.
        opset: The version of ONNX's operators.

    Returns:
        A graph with the inputs of ``Decoder.forward``, in which every hook point is marked. Its initializers are named as the
        parameters and hold no data; buffers do.
    """
    work = _Recorder(decoder)
    inputs = {name: work.input(name, *kind) for name, kind in _INPUTS.items()}
    logits: Recorded = decoder(*inputs.values())
    logits.value.name = LOGITS
    graph = ir.Graph(
        [given.value for given in inputs.values()],
        [logits.value],
        nodes=work.nodes,
        initializers=list(work.initializers.values()),
        opset_imports={"": opset, HOOK_DOMAIN: 1},
        name="recorded",
    )
    return ir.Model(graph, ir_version=10)


class Recorded:
    """A tensor that is not there: the value of a graph that it will be, with its shape, in which sizes may be names.

    Attributes:
        value: The value.
        shape: Its sizes.
        dtype: Its dtype.
    """

    device = torch.device("cpu")

    def __init__(self, work: _Recorder, value: ir.Value, shape: Sequence[Size], dtype: torch.dtype) -> None:
        self._work, self.value, self.shape, self.dtype = work, value, tuple(shape), dtype

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., object],
        _: Iterable[type],
        given: Sequence[object] = (),
        named: Mapping[str, object] | None = None,
    ) -> Recorded:
        if function not in _FUNCTIONS:
            raise NotImplementedError(f"internal error: {function} is not recorded")
        return _FUNCTIONS[function](*given, **(named or {}))

    def op(
        self,
        kind: str,
        *others: Operand,
        shape: Sequence[Size] | None = None,
        dtype: torch.dtype | None = None,
        **attributes: Attribute,
    ) -> Recorded:
        """What an operator makes of this and other tensors; of the same shape and dtype where nothing is said."""
        return self._work.op(
            kind, [self, *others], self.shape if shape is None else shape, dtype or self.dtype, attributes
        )

    def marked(self, operator: str, name: str) -> Recorded:
        """The tensor with a mark of our own on it."""
        return self._work.op(operator, [self], self.shape, self.dtype, {"name": name}, HOOK_DOMAIN)

    def _binary(self, kind: str, other: Operand, swapped: bool = False) -> Recorded:
        theirs = tuple(other.shape) if isinstance(other, Recorded | Tensor) else ()
        pair: list[Operand] = [other, self] if swapped else [self, other]
        return self._work.op(kind, pair, _broadcast(self.shape, theirs), self.dtype, {})

    def __add__(self, other: Operand) -> Recorded:
        return self._binary("Add", other)

    def __sub__(self, other: Operand) -> Recorded:
        return self._binary("Sub", other)

    def __mul__(self, other: Operand) -> Recorded:
        return self._binary("Mul", other)

    def __truediv__(self, other: Operand) -> Recorded:
        return self._binary("Div", other)

    def __rmul__(self, other: Operand) -> Recorded:
        return self._binary("Mul", other, swapped=True)

    def __neg__(self) -> Recorded:
        return self.op("Neg")

    def __matmul__(self, other: Recorded | Tensor) -> Recorded:
        theirs = tuple(other.shape)
        shape = (*_broadcast(self.shape[:-2], theirs[:-2]), self.shape[-2], theirs[-1])
        return self.op("MatMul", other, shape=shape)

    def cos(self) -> Recorded:
        """The cosine."""
        return self.op("Cos")

    def sin(self) -> Recorded:
        """The sine."""
        return self.op("Sin")

    def clamp(self, least: float, most: float) -> Recorded:
        """Cut to a range."""
        return self.op("Clip", self._work.constant(least, self.dtype), self._work.constant(most, self.dtype))

    def mean(self, axis: int, keepdim: bool) -> Recorded:
        """The mean along the last axis, which stays."""
        assert axis == -1
        assert keepdim
        return self.op("ReduceMean", self._work.integers([-1]), shape=(*self.shape[:-1], 1), keepdims=1)

    def to(self, dtype: torch.dtype) -> Recorded:
        """In another dtype."""
        return self if dtype == self.dtype else self.op("Cast", dtype=dtype, to=int(_TYPES[dtype]))

    def transpose(self, one: int, other: int) -> Recorded:
        """With two axes exchanged."""
        order = list(range(len(self.shape)))
        order[one], order[other] = order[other], order[one]
        return self.op("Transpose", shape=[self.shape[axis] for axis in order], perm=order)

    def unsqueeze(self, axis: int) -> Recorded:
        """With a new axis."""
        at = axis % (len(self.shape) + 1)
        return self.op("Unsqueeze", self._work.integers([at]), shape=(*self.shape[:at], 1, *self.shape[at:]))

    def repeat_interleave(self, times: int, axis: int) -> Recorded:
        """With every entry of an axis so many times."""
        at = axis % len(self.shape)
        column, size = self.unsqueeze(at + 1), self.shape[at]
        assert isinstance(size, int)
        shape = [*self.shape[: at + 1], times, *self.shape[at + 1 :]]
        ones = [times if place == at + 1 else 1 for place in range(len(shape))]
        wide = column.op("Expand", self._work.integers(ones), shape=shape)
        # Of the sizes that are no numbers, those before the axis stay where they are and one after it is what is left:
        # with past keys it is another than that of the new tokens.
        wanted = [0 if isinstance(other, str) else other for other in self.shape[:at]]
        wanted += [size * times, *(-1 if isinstance(other, str) else other for other in self.shape[at + 1 :])]
        return wide.op(
            "Reshape", self._work.integers(wanted), shape=[*self.shape[:at], size * times, *self.shape[at + 1 :]]
        )

    def split(self, sizes: int | Sequence[int], axis: int) -> list[Recorded]:
        """Parts of the last axis."""
        assert axis == -1
        whole = self.shape[-1]
        assert isinstance(whole, int)
        parts = [sizes] * (whole // sizes) if isinstance(sizes, int) else list(sizes)
        return self._work.split(self, parts)

    def reshape(self, *given: Size | Sequence[Size]) -> Recorded:
        """With other axes."""
        wanted: list[Size] = []
        for sizes in given:
            wanted += [sizes] if isinstance(sizes, int | str) else sizes
        shape = [_left_over(self.shape, wanted) if size == -1 else size for size in wanted]
        stays = [place < len(self.shape) and self.shape[place] == size for place, size in enumerate(shape)]
        if -1 in wanted or all(isinstance(size, int) or stays[place] for place, size in enumerate(shape)):
            told: list[Size] = [
                -1 if size == -1 and isinstance(shape[place], str) else 0 if stays[place] else shape[place]
                for place, size in enumerate(wanted)
            ]
            return self.op("Reshape", self._work.integers(told), shape=shape)
        return self.op("Reshape", self._work.sizes(shape), shape=shape)


def _left_over(shape: Sequence[Size], wanted: Sequence[Size]) -> Size:
    """The size that -1 stands for."""
    names = [size for size in shape if isinstance(size, str) and size not in wanted]
    rest = math.prod(size for size in shape if isinstance(size, int)) // math.prod(
        size for size in wanted if isinstance(size, int) and size != -1
    )
    return rest if not names else "*".join([*names, *([str(rest)] if rest > 1 else [])])


def _broadcast(one: Sequence[Size], other: Sequence[Size]) -> tuple[Size, ...]:
    """The shape of what two shapes become."""
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    padded = [1] * (len(longer) - len(shorter)) + list(shorter)
    return tuple(b if a == 1 else a for a, b in zip(longer, padded, strict=True))


class _Recorder:
    """The nodes and initializers of a graph under construction."""

    def __init__(self, model: nn.Module) -> None:
        held = (*model.named_parameters(), *model.named_buffers())
        self._names = {id(tensor): name for name, tensor in held}
        self._kept = [tensor for _, tensor in held]  # so that no other tensor gets one's id
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._shapes: ir.Value | None = None
        self._positions: ir.Value | None = None

    def input(self, name: str, shape: tuple[Size, ...], dtype: torch.dtype) -> Recorded:
        """An input of the graph."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(_TYPES[dtype]))
        if name == POSITIONS:
            self._positions = value
        return Recorded(self, value, shape, dtype)

    def op(
        self,
        kind: str,
        inputs: Sequence[Operand],
        shape: Sequence[Size],
        dtype: torch.dtype,
        attributes: Mapping[str, Attribute],
        domain: str = "",
    ) -> Recorded:
        """A new node's output. Numbers among its inputs get the dtype of the tensor beside them."""
        beside = next(one.dtype for one in inputs if isinstance(one, Recorded | Tensor))
        read = [self._value(one, beside) for one in inputs]
        value = ir.Value(
            name=f"{kind}_{len(self.nodes)}", shape=ir.Shape(list(shape)), type=ir.TensorType(_TYPES[dtype])
        )
        self._add(domain, kind, read, attributes, [value])
        return Recorded(self, value, shape, dtype)

    def split(self, whole: Recorded, parts: Sequence[int]) -> list[Recorded]:
        """Parts of the last axis of a tensor."""
        shapes = [(*whole.shape[:-1], part) for part in parts]
        values = [
            ir.Value(name=f"Split_{len(self.nodes)}_{place}", shape=ir.Shape(list(shape)), type=whole.value.type)
            for place, shape in enumerate(shapes)
        ]
        self._add("", "Split", [whole.value, self.integers(parts)], {"axis": -1}, values)
        return [Recorded(self, value, shape, whole.dtype) for value, shape in zip(values, shapes, strict=True)]

    def _add(
        self,
        domain: str,
        kind: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, Attribute],
        outputs: Sequence[ir.Value],
    ) -> None:
        told = ir.convenience.convert_attributes(attributes)
        self.nodes.append(ir.Node(domain, kind, inputs, told, outputs=outputs, name=f"node_{len(self.nodes)}"))

    def _value(self, one: Operand, dtype: torch.dtype) -> ir.Value:
        """The value of an operand: a recorded tensor, a parameter or buffer, or a constant."""
        if isinstance(one, Recorded):
            return one.value
        if isinstance(one, ir.Value):
            return one
        if isinstance(one, Tensor) and id(one) in self._names:
            return self._initializer(self._names[id(one)], one)
        return self.constant(one.item() if isinstance(one, Tensor) else one, dtype)

    def _initializer(self, name: str, tensor: Tensor) -> ir.Value:
        """A parameter, which holds no data, or a buffer."""
        if name not in self.initializers:
            content = None if tensor.is_meta else ir.tensor(tensor.detach().numpy(), name=name)
            kind = ir.TensorType(_TYPES[tensor.dtype])
            shape = ir.Shape(tensor.shape)
            self.initializers[name] = ir.Value(name=name, shape=shape, type=kind, const_value=content)
        return self.initializers[name]

    def constant(self, number: float | bool, dtype: torch.dtype) -> ir.Value:
        """A scalar, one for all that read the same."""
        return self._constant(np.asarray(number, _TYPES[dtype].numpy()))

    def integers(self, numbers: Sequence[Size]) -> ir.Value:
        """A list of int64."""
        return self._constant(np.asarray(numbers, np.int64))

    def _constant(self, array: Array) -> ir.Value:
        name = f"constant/{array.dtype}/{array.tolist()}"
        if name not in self.initializers:
            content = ir.tensor(array, name=name)
            self.initializers[name] = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(content.dtype), const_value=content
            )
        return self.initializers[name]

    def sizes(self, shape: Sequence[Size]) -> ir.Value:
        """A shape that begins with the batch and the new tokens, for a Reshape."""
        assert tuple(shape[:2]) == (_BATCH, _SEQUENCE)
        assert self._positions is not None
        kind = ir.TensorType(ir.DataType.INT64)
        if self._shapes is None:
            self._shapes = ir.Value(name="sizes", shape=ir.Shape([2]), type=kind)
            self._add("", "Shape", [self._positions], {"start": 0, "end": 2}, [self._shapes])
        value = ir.Value(name=f"sizes_{len(self.nodes)}", shape=ir.Shape([len(shape)]), type=kind)
        self._add("", "Concat", [self._shapes, self.integers(shape[2:])], {"axis": 0}, [value])
        return value


# Functions of torch, on recorded tensors


def _embedding(ids: Recorded, weight: Tensor, **_: object) -> Recorded:
    return ids._work.op("Gather", [weight, ids], (*ids.shape, weight.shape[1]), weight.dtype, {"axis": 0})


def _where(condition: Recorded, one: Recorded | Tensor, other: Recorded | Tensor) -> Recorded:
    chosen = one if isinstance(one, Recorded) else other
    shape = _broadcast(condition.shape, _broadcast(tuple(one.shape), tuple(other.shape)))
    read = [
        each if isinstance(each, Recorded) else condition._work.constant(each.item(), chosen.dtype)
        for each in (one, other)
    ]
    return condition._work.op("Where", [condition, *read], shape, chosen.dtype, {})


def _addmm(bias: Tensor, flat: Recorded, weight: Tensor) -> Recorded:
    return flat.op("Gemm", weight, bias, shape=(flat.shape[0], weight.shape[1]))


def _linear(flat: Recorded, weight: Tensor, bias: Tensor | None = None) -> Recorded:
    others = [weight] if bias is None else [weight, bias]
    return flat.op("Gemm", *others, shape=(flat.shape[0], weight.shape[0]), transB=1)


def _cat(parts: Sequence[Recorded], axis: int) -> Recorded:
    first, *others = parts
    assert axis == -1
    size = sum(int(part.shape[-1]) for part in parts)
    return first.op("Concat", *others, shape=(*first.shape[:-1], size), axis=-1)


def _gelu(x: Recorded, approximate: str = "none") -> Recorded:
    return x.op("Gelu", approximate=approximate)


def _silu(x: Recorded, inplace: bool = False) -> Recorded:
    return x * x.op("Sigmoid")


_FUNCTIONS: Mapping[Callable[..., object], Callable[..., Recorded]] = {
    functional.embedding: _embedding,
    functional.gelu: _gelu,
    functional.linear: _linear,
    functional.relu: lambda x, inplace=False: x.op("Relu"),
    functional.silu: _silu,
    torch.Tensor.mul: lambda one, other: one * other if isinstance(one, Recorded) else other.__rmul__(one),
    torch.addmm: _addmm,
    torch.cat: _cat,
    torch.isnan: lambda x: x.op("IsNaN", dtype=torch.bool),
    torch.matmul: lambda x, other: x @ other,
    torch.softmax: lambda x, dim: x.op("Softmax", axis=dim),
    torch.sqrt: lambda x: x.op("Sqrt"),
    torch.tanh: lambda x: x.op("Tanh"),
    torch.where: _where,
}
