"""Runs of a graph that another program exported: what each of its values is like, and what it gives on probes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphlens.errors import ModelFileError, RunError
from graphlens.file.io_names import (
    ATTENTION_MASK,
    INPUT_IDS,
    PIXELS,
    TOKEN_TYPE_IDS,
    past_input,
)
from graphlens.file.safetensors import Array
from graphlens.runtime.sessions import Session, open_session
from graphlens.surgery.adoptable import STILL
from graphlens.surgery.adopted.hooks import Seen
from graphlens.surgery.match.records import Ports
from graphlens.surgery.unfusing.channels import BLOCKED

BATCH, LENGTH = 3, 11  # of the run that tells shapes: sizes that models seldom have
_SHAPE = "graphlens/shape/"  # what the shape of a value is called, and its place
_TRIES = (1, 0)  # what tokens, masks, positions and types may all be
PADDED, _CACHED = 3, 4  # tokens of padding, and of a prompt that a KV cache holds


def seen_values(model: ir.Model, folder: Path, where: str, image: int | None = None) -> dict[str, Seen]:
    """What each value of a graph is like: its type as ONNX Runtime infers it, its shape in one run.

    Args:
        model: The graph. Its weights lie in ``folder``.
        folder: See above.
        where: The file's name, for errors.
        image: The height and width of images, where the graph does not say.

    Returns:
        Name -> shape and dtype: the graph's inputs, and every value that a node computes.

    Raises:
        ModelFileError: ONNX Runtime refuses the graph, or its inputs are of no kind that graphlens knows how to feed.
    """
    given = {str(value.name) for value in model.graph.outputs}
    computed = [value for node in model.graph for value in node.outputs if value.name and value.uses()]
    found = {str(value.name): seen for value in computed if (seen := _constant(value)) is not None}
    every = [*given, *(str(value.name) for value in computed if value.name not in given and value.name not in found)]
    types = open_session(_bytes(model, every), "cpu", folder, name=where, as_written=True).declared()
    # The run hands out shapes alone: all values of a graph at once would take more memory than its weights.
    session = open_session(_bytes(model, every, shapes=True), "cpu", folder, name=where, as_written=True)
    required = _required(model)
    of_tokens = any(value.dtype is not None and value.dtype.is_integer() for value in required)
    error: RunError | None = None
    for number in _TRIES:
        feeds = {str(value.name): _example(value, number, where, image, of_tokens) for value in required}
        try:
            shapes = session.run(session.outputs, feeds)
        except RunError as failed:
            error = failed
            continue
        found |= {name: Seen(tuple(array.shape), str(array.dtype)) for name, array in feeds.items()}
        for name, shape in zip(every, shapes, strict=True):
            found[name] = Seen(tuple(shape.tolist()), _numpy_name(types[name][0]))
        return found
    raise ModelFileError(f"{where}: ONNX Runtime cannot run it on a short prompt ({error!s:.400}).") from error


def _constant(value: ir.Value) -> Seen | None:
    """What a constant that a node holds as a tensor is like; None for any other value."""
    node = value.producer()
    if node is None or node.op_type != "Constant" or "value" not in node.attributes:
        return None
    tensor = node.attributes["value"].as_tensor()
    return Seen(tuple(int(str(size)) for size in tensor.shape), str(tensor.dtype.numpy()))


def _numpy_name(kind: str) -> str:
    """What NumPy calls the type of a tensor, of what ONNX Runtime calls it: "tensor(float)"."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


def open_written(model: ir.Model, folder: Path, where: str, read: Sequence[str] = ()) -> Session:
    """A session over a graph in memory, each node as it is written.

    Args:
        model: The graph. Its weights lie in ``folder``.
        folder: See above.
        where: The file's name, for errors.
        read: The names of values that will be fetched, besides its outputs.
    """
    outputs = [str(value.name) for value in model.graph.outputs]
    return open_session(
        _bytes(model, list(dict.fromkeys([*outputs, *read]))), "cpu", folder, name=where, as_written=True
    )


def channel_block(model: ir.Model) -> int:
    """How many channels ONNX Runtime takes at once on this machine, where a graph was optimised for one: 8 or 16. Else 0.

    Args:
        model: The graph.
    """
    if not any(node.domain == BLOCKED for node in model.graph):
        return 0
    pixels = ir.Value(name="pixels", shape=ir.Shape([1, 16, 1, 2]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.Node(BLOCKED, "ReorderInput", [pixels], outputs=[ir.Value(name="blocks")])
    imports = {"": 20, BLOCKED: 1}
    graph = ir.Graph([pixels], node.outputs, nodes=[node], opset_imports=imports)
    session = open_session(_bytes(ir.Model(graph, ir_version=10)), "cpu", name="a graph of one node", as_written=True)
    image = np.arange(32, dtype=np.float32).reshape(1, 16, 1, 2)
    (found,) = session.run(["blocks"], {"pixels": image})
    return 16 if found.reshape(-1)[8] == image[0, 8, 0, 0] else 8


def _required(model: ir.Model) -> list[ir.Value]:
    """The inputs that a run must feed."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def _bytes(model: ir.Model, outputs: Sequence[str] = (), shapes: bool = False) -> bytes:
    """A graph whose weights are in files, for ONNX Runtime.

    Args:
        model: The graph.
        outputs: The names of the values that it is to return; by default its own outputs. Their types are inferred.
        shapes: True for their shapes in their place.
    """
    proto = ir.to_proto(model)
    if outputs:
        del proto.graph.output[:]
    for index, name in enumerate(outputs):
        result = name if not shapes else f"{_SHAPE}{index}"
        proto.graph.output.add(name=result)
        if shapes:
            proto.graph.node.add(op_type="Shape", input=[name], output=[result], name=result)
    for output in proto.graph.output:
        output.ClearField("type")
    del proto.graph.value_info[:]
    data: bytes = proto.SerializeToString()
    return data


def _example(value: ir.Value, number: int, where: str, image: int | None, of_tokens: bool) -> Array:
    """A small array for an input, by its rank and type alone: names are no proof.

    Args:
        value: The input.
        number: What integers hold.
        where: The file's name, for errors.
        image: The height and width of images, where the graph does not say.
        of_tokens: True if the graph takes integers, so that what has four axes are past keys and values, and no pixels.
    """
    dtype = value.dtype
    if value.shape is None or dtype is None:
        raise ModelFileError(f"{where}: its input {value.name!r} has no type or shape. {STILL}")
    sizes = [size if isinstance(size, int) else None for size in value.shape]
    usual: list[int] = []
    if len(sizes) == 2:
        usual = [BATCH, LENGTH]
    elif len(sizes) == 4 and dtype.is_floating_point():
        pixels = not of_tokens and (sizes[2] is not None) == (sizes[3] is not None) and sizes[1] in (None, 1, 3)
        usual = [BATCH, 3, image or 224, image or 224] if pixels else [BATCH, 1, 0, 1]
    if not usual:
        raise ModelFileError(
            f"{where}: its input {value.name!r} ({dtype.name} {value.shape}) is none that a transformer takes. {STILL}"
        )
    shape = [usual[place] if size is None else size for place, size in enumerate(sizes)]
    return np.full(shape, number if len(sizes) == 2 else 0, dtype.numpy())


# Probes


@dataclass(frozen=True)
class Probe:
    """Prompts to run, in the inputs of a hooked file.

    Attributes:
        tokens: int64 [b, p].
        mask: int64 [b, past + p], 1 at real tokens; None where the graph takes no mask.
        types: int64 [b, p]; None where it takes no types of tokens.
        past: Input of past keys or values -> what it is fed.
        pixels: float32 [b, channels, height, width] of a vision model, whose tokens are not fed; else None.
    """

    tokens: Array
    mask: Array | None = None
    types: Array | None = None
    past: Mapping[str, Array] = field(default_factory=dict)
    pixels: Array | None = None

    def rows(self, kept: Sequence[int]) -> Probe:
        """Some of the prompts.

        Args:
            kept: Which.
        """
        mask, types = (None if each is None else each[kept] for each in (self.mask, self.types))
        return replace(self, tokens=self.tokens[kept], mask=mask, types=types)

    def unpadded(self) -> Probe:
        """The same tokens, all of them real."""
        return replace(self, mask=None if self.mask is None else np.ones_like(self.mask))

    def hooked(self) -> dict[str, Array]:
        """The feeds of a hooked file."""
        if self.pixels is not None:
            return {PIXELS: self.pixels}
        feeds = {INPUT_IDS: self.tokens, **self.past}
        if self.mask is not None:
            feeds[ATTENTION_MASK] = self.mask
        if self.types is not None:
            feeds[TOKEN_TYPE_IDS] = self.types
        return feeds

    def original(self, ports: Ports, seen: Mapping[str, Seen]) -> dict[str, Array]:
        """The feeds of the original file, which leaves nothing out.

        Args:
            ports: What its inputs are.
            seen: What a run saw of them.
        """
        if self.pixels is not None:
            return {ports.input: self.pixels.astype(seen[ports.input].dtype)}
        batch, length = self.tokens.shape
        before = next((array.shape[2] for array in self.past.values()), 0)
        mask = np.ones((batch, before + length), np.int64) if self.mask is None else self.mask
        counted = np.maximum(mask.cumsum(-1) - 1, 0)[:, before:]
        types = np.zeros_like(self.tokens) if self.types is None else self.types
        beside = ((ports.attention_mask, mask), (ports.position_ids, counted), (ports.token_type_ids, types))
        feeds = {ports.input: self.tokens, **{name: array for name, array in beside if name is not None}}
        for (layer, part), name in ports.past.items():
            heads, size = seen[name].shape[1], seen[name].shape[3]
            empty = np.zeros((batch, heads, 0, size), seen[name].dtype)
            feeds[name] = self.past.get(past_input(layer, part), empty)
        return {name: array.astype(seen[name].dtype) for name, array in feeds.items()}


def padded_probe(ports: Ports, d_vocab: int, n_types: int | None, n_ctx: int) -> Probe:
    """Prompts over the vocabulary: one as long as can be, and a shorter one padded on the left, on the right, and on the left
    with other tokens.

    Args:
        ports: What the graph's inputs are. Without a mask nothing is padded.
        d_vocab: How many tokens there are.
        n_types: How many types of tokens.
        n_ctx: The longest input.
    """
    length = min(LENGTH, n_ctx)
    random = np.random.default_rng(0)
    tokens = random.integers(0, d_vocab, (4, length))
    types = random.integers(0, n_types or 1, tokens.shape) if ports.token_type_ids is not None else None
    if ports.attention_mask is None:
        return Probe(tokens, None, types)
    real = max(1, length - PADDED)
    mask = np.ones(tokens.shape, np.int64)
    mask[[1, 3], : length - real] = 0
    mask[2, real:] = 0
    for each in (tokens, types):
        if each is not None:
            each[2, :real] = each[3, length - real :] = each[1, length - real :]
    return Probe(tokens, mask, types)


def image_probe(sizes: Sequence[int], n_ctx: int) -> Probe:
    """Three images of noise.

    Args:
        sizes: Their channels, height and width.
        n_ctx: How many tokens an image becomes.
    """
    pixels = np.random.default_rng(0).standard_normal((3, *sizes)).astype(np.float32)
    return Probe(np.zeros((3, n_ctx), np.int64), pixels=pixels)


def image_side(model: ir.Model) -> int | None:
    """The height and width of a vision model's images, from its patches and its table of positions.

    Args:
        model: The graph.

    Returns:
        The side of a square image; None where the two do not tell it, or the input does.
    """
    for node in model.graph:
        weight = node.inputs[1] if node.op_type in ("Conv", "ConvInteger") and len(node.inputs) > 1 else None
        if weight is None or weight.shape is None or len(weight.shape) != 4:
            continue
        width, patch = weight.shape[0], weight.shape[3]
        for table in model.graph.initializers.values():
            sizes = [] if table.shape is None else list(table.shape)
            if len(sizes) == 3 and sizes[0] == 1 and sizes[2] == width and isinstance(sizes[1], int) and sizes[1] > 1:
                # A class token has a position too, and where there is another token (distillation) two have.
                sides = [
                    math.isqrt(sizes[1] - more)
                    for more in (1, 2, 0)
                    if math.isqrt(sizes[1] - more) ** 2 == sizes[1] - more
                ]
                if sides and isinstance(patch, int):
                    return sides[0] * patch
    return None


def stepped(source: Session, whole: Probe, ports: Ports, seen: Mapping[str, Seen]) -> Probe | None:
    """The last tokens of a probe, with the keys and values of those before them from a run of the original.

    Args:
        source: The original's session.
        whole: Prompts without padding on the right.
        ports: What the original's inputs and outputs are.
        seen: What a run saw of them.

    Returns:
        The probe; None where prompts are too short to be cut.
    """
    cached = min(_CACHED, whole.tokens.shape[1] - 1)
    if cached < 1:
        return None
    first = Probe(whole.tokens[:, :cached], None if whole.mask is None else whole.mask[:, :cached])
    found = source.run(list(ports.present.values()), first.original(ports, seen))
    past = {past_input(*name): array for name, array in zip(ports.present, found, strict=True)}
    return Probe(whole.tokens[:, cached:], whole.mask, None, past)
