"""The weights of a graph that another program exported, moved into one safetensors file of our own, as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from graphlens.errors import ModelFileError
from graphlens.file.manifest import WeightView
from graphlens.file.quantised import Quantisation
from graphlens.file.safetensors import Array, SafetensorsFile, TensorEntry, write_safetensors
from graphlens.file.stored import DATA_TYPES, bind, path_of
from graphlens.surgery.match.records import MatchedWeight

WEIGHTS_FILE = "adopted.safetensors"
_SMALL = 256  # bytes of a constant that stays in the graph, where optimisers look at it
_KEYS: Mapping[ir.DataType, str] = {dtype: key for key, dtype in DATA_TYPES.items()}
_CHUNK = 1 << 24


def move_weights(model: ir.Model, path: Path) -> dict[str, str]:
    """Writes a model's weights into a safetensors file, tensor by tensor, and points its initializers there, in place.

    Tensors of more than a few numbers move, biases and norms of whatever size too. Single numbers (scales, zero points) are
    copied: the graph keeps them, and the file has them for the views of quantised weights. Types that safetensors lacks
    (packed 4-bit ones) stay in the graph.

    Args:
        model: A model whose tensors were checked (``check_graph``). Those in files are copied in chunks.
        path: The file; it must not be there yet.

    Returns:
        The name of each initializer that the file has -> its key.

    Raises:
        ModelFileError: A tensor holds other bytes than its shape says.
        OSError: The file cannot be written.
    """
    moved: dict[str, ir.Value] = {}
    copied: dict[str, ir.Value] = {}
    keys: dict[str, str] = {}
    known: dict[tuple[str, int, ir.DataType, tuple[int, ...]], str] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and not (_is_weight(tensor) and tensor.dtype in _KEYS):
            tensor = value.const_value = _in_memory(tensor)  # it stays in the graph
        if tensor is None or tensor.dtype not in _KEYS:
            continue
        where = _place(tensor)
        if where is not None and where in known:
            keys[name] = known[where]  # two initializers over one tensor: tied weights
            moved[name] = value
            continue
        keys[name] = name
        if where is not None:
            known[where] = name
        (moved if _is_weight(tensor) else copied)[name] = value
    own = {name: value for name, value in {**moved, **copied}.items() if keys[name] == name}
    tensors = {name: value.const_value for name, value in own.items() if value.const_value is not None}
    entries = {
        name: TensorEntry(_KEYS[tensor.dtype], _shape(tensor), 0, tensor.nbytes) for name, tensor in tensors.items()
    }
    write_safetensors(path, entries, _contents(tensors))
    placed = SafetensorsFile(path).entries
    for name, value in moved.items():
        bind(value, path, placed[keys[name]])
    return keys


def let_go(model: ir.Model) -> None:
    """Closes the files of a model's weights that were mapped to look at some: their pages count as memory.

    Args:
        model: A model. What is looked at again is mapped again.
    """
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.release()


def _is_weight(tensor: ir.TensorProtocol) -> bool:
    """True for what moves: large tensors, and lists of numbers with a fraction, which biases and norms are."""
    return tensor.nbytes >= _SMALL or (tensor.dtype.is_floating_point() and tensor.size > 1)


def _in_memory(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    """A tensor of a file with its content in memory."""
    with path_of(tensor).open("rb") as file:
        file.seek(int(tensor.offset or 0))
        data = file.read(tensor.nbytes)
    proto = onnx.TensorProto(
        dims=_shape(tensor), data_type=int(tensor.dtype), raw_data=data, name=str(tensor.name or "")
    )
    return ir.TensorProtoTensor(proto)


def _shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(int(str(size)) for size in tensor.shape)


def _place(tensor: ir.TensorProtocol) -> tuple[str, int, ir.DataType, tuple[int, ...]] | None:
    """Where a tensor in a file lies, and what it is; None for one in the graph."""
    if not isinstance(tensor, ir.ExternalTensor) or not tensor.size:
        return None
    return str(path_of(tensor)), int(tensor.offset or 0), tensor.dtype, _shape(tensor)


def _contents(tensors: Mapping[str, ir.TensorProtocol]) -> Iterator[Array]:
    """The bytes of each tensor, one after the other; large ones in files in several pieces."""
    for name, tensor in tensors.items():
        if isinstance(tensor, ir.ExternalTensor):
            with path_of(tensor).open("rb") as file:
                file.seek(int(tensor.offset or 0))
                left = tensor.nbytes
                while left:
                    chunk = np.frombuffer(file.read(min(left, _CHUNK)), np.uint8)
                    if not chunk.size:
                        raise ModelFileError(f"{path_of(tensor)}: cut short in the tensor {name!r}.")
                    left -= chunk.size
                    yield chunk
            continue
        try:
            data = tensor.tobytes()
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelFileError(f"the tensor {name!r} does not hold what its shape says ({error!s:.200}).") from error
        if len(data) != tensor.nbytes:
            raise ModelFileError(
                f"the tensor {name!r} holds {len(data):,} bytes, and its shape and type call for {tensor.nbytes:,}."
            )
        yield np.frombuffer(data, np.uint8)


def _columns(model: ir.Model, tensor: str) -> int | None:
    """How many numbers a row of a packed tensor has, as the node that multiplies by it says; None where none says."""
    value = model.graph.initializers.get(tensor)
    for node, _ in () if value is None else value.uses():
        if node.op_type == "MatMulNBits":
            return node.attributes["K"].as_int()
    return None


def weight_views(
    model: ir.Model, weights: Mapping[str, MatchedWeight], keys: Mapping[str, str], file: str
) -> dict[str, WeightView]:
    """TransformerLens weight names -> views of the tensors in the weights file.

    Args:
        model: The graph.
        weights: What matching found.
        keys: What ``move_weights`` gave.
        file: The name of the weights file.

    Returns:
        The views of those weights that the file has; others are left out.
    """
    found = {}
    for name, weight in weights.items():
        how, needed = weight.quantised, [weight.tensor]
        if how is not None:
            needed += [key for key in (how.scale, how.zero_point) if key is not None]
        if not all(key in keys for key in needed):
            continue
        view = WeightView(
            file,
            keys[weight.tensor],
            weight.take,
            weight.shape,
            weight.permute,
            weight.cut,
            weight.within,
            weight.joined,
            weight.times,
            weight.plus,
        )
        if how is not None:
            zero_point = None if how.zero_point is None else keys[how.zero_point]
            view = replace(
                view,
                quantised=Quantisation(
                    keys[how.scale], zero_point, how.axis, how.bits, how.block, _columns(model, weight.tensor)
                ),
            )
        found[name] = view
    return found
