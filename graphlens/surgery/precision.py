"""Precision: a float32 hooked file rewritten to compute, or to store its weights, in another floating-point type."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from graphlens.errors import ExportError
from graphlens.file.copies import ensure_room
from graphlens.file.folder import MODEL_FILE, converted_weights, copy_settings
from graphlens.file.manifest import HookEntry, ModelConfig
from graphlens.file.processing import ensure_own
from graphlens.file.safetensors import Array, SafetensorsFile, TensorEntry, write_safetensors
from graphlens.file.stored import DATA_TYPES, bind, in_files, place_of
from graphlens.surgery.files import load, write_graph
from graphlens.surgery.fingerprint import fingerprint
from graphlens.surgery.graph import finish, install, let_read, named, numbered, read_manifest, replace_value

_STORED = {"float64": "F64", "float16": "F16", "bfloat16": "BF16"}  # safetensors' names of dtypes


def convert_into(source: Path, stage: Path, dtype: str) -> None:
    """Writes a model into a folder in another dtype.

    float64 and float16 are computed in; bfloat16 is stored and cast to float32 in the graph, since ONNX Runtime's CPU
    kernels do not compute in it. What follows from positions alone (the angles of rotary embeddings, distances) stays
    float32, as in transformers, and in float16 also the mean squares of norms, which would overflow.

    Args:
        source: The graph file of a float32 model.
        stage: The folder.
        dtype: ``"float64"``, ``"float16"`` or ``"bfloat16"``.

    Raises:
        ExportError: The model is not float32.
    """
    model = load(source)
    manifest = read_manifest(model)
    ensure_own(manifest, source, "Such files are not converted to another dtype")
    if manifest.config.dtype != "float32":
        raise ExportError(f"{source}: holds {manifest.config.dtype}; only float32 files are converted.")
    kind = DATA_TYPES[_STORED[dtype]]
    written = stage / converted_weights(dtype)
    files = [SafetensorsFile(source.parent / name) for name in manifest.files]
    _rewrite_weights(files, written, _STORED[dtype])
    _rebind(model, files, SafetensorsFile(written))
    config = manifest.config
    hooks = manifest.hooks
    if dtype == "bfloat16":
        _cast_weights(model)
    else:
        _retype(model, kind, config, hooks)
        if kind == ir.DataType.DOUBLE:
            _decompose_gelu(model)
        config = replace(config, dtype=dtype)
        hooks = {n: replace(h, dtype=dtype) if h.dtype == "float32" else h for n, h in hooks.items()}
    views = {name: replace(view, file=written.name) for name, view in manifest.weights.items()}
    prints = {written.name: fingerprint(written)}
    done = replace(manifest, config=config, hooks=hooks, weights=views, files=prints)
    write_graph(finish(model, done, "the converted graph"), stage / MODEL_FILE)
    copy_settings(source.parent, stage)


def _rewrite_weights(files: list[SafetensorsFile], target: Path, stored: str) -> None:
    """Writes the float32 tensors of files into one file in another dtype, one tensor in memory at a time."""
    dtype = DATA_TYPES[stored].numpy()
    wanted = [(file, key) for file in files for key, entry in file.entries.items() if entry.dtype == "F32"]
    entries = {}
    for file, key in wanted:
        shape = file.entries[key].shape
        entries[key] = TensorEntry(stored, shape, 0, math.prod(shape) * dtype.itemsize)

    def arrays() -> Iterator[Array]:
        yield from (file.array(key).astype(dtype) for file, key in wanted)

    ensure_room(target.parent, sum(entry.length for entry in entries.values()))
    write_safetensors(target, entries, arrays())


def _rebind(model: ir.Model, files: list[SafetensorsFile], written: SafetensorsFile) -> None:
    """Points every initializer that lies in a file, in place, at the tensor of the same name in the new file."""
    keys = {(file.path.name, entry.offset): key for file in files for key, entry in file.entries.items()}
    for value, tensor in in_files(model):
        bind(value, written.path, written.entries[keys[place_of(tensor)]])


def _cast_weights(model: ir.Model) -> None:
    """Puts a Cast to float32 behind every bfloat16 initializer, in place; it folds away when the model is loaded."""
    for value in list(model.graph.initializers.values()):
        if value.dtype != ir.DataType.BFLOAT16:
            continue
        readers = tuple(value.uses())
        tape = Tape()
        cast = tape.op("Cast", [value], {"to": ir.DataType.FLOAT})
        cast.name, cast.type = f"{value.name}/float32", ir.TensorType(ir.DataType.FLOAT)
        let_read(readers, cast, value)
        install(model.graph, tape, named(f"{value.name}/cast"), after=value)


def _exact(number: float, config: ModelConfig) -> float:
    """The number that a float32 constant of the graph means: scales are known exactly, others were written in decimal."""
    scales = [1.0, 1 / config.attn_scale]
    known = [
        config.d_model**0.5,
        config.output_logits_scale,
        *(scale / layer for scale in scales for layer in range(1, config.n_layers + 1)),
    ]
    rounded = np.float32(number)
    return next((exact for exact in known if np.float32(exact) == rounded), float(str(rounded)))


def _retype(model: ir.Model, kind: ir.DataType, config: ModelConfig, hooks: Mapping[str, HookEntry]) -> None:
    """Makes float32 values, constants and casts of the graph ones of another type, in place, but for those that stay."""
    graph = model.graph
    kept = _of_positions(graph)
    if kind == ir.DataType.FLOAT16:
        kept |= _mean_squares(graph, {entry.value for name, entry in hooks.items() if name.endswith(".hook_scale")})
    constants = _fence(graph, kept, kind)
    for value in graph.initializers.values():
        if value.dtype != ir.DataType.FLOAT or value.const_value is None or value in constants:
            continue
        array = value.const_value.numpy().astype(np.float64)
        array = np.vectorize(lambda x: _exact(float(x), config), otypes=[np.float64])(array) if array.size else array
        value.const_value = ir.tensor(array.astype(kind.numpy()), name=value.name)
        value.type = ir.TensorType(kind)
    for value in [*graph.inputs, *(output for node in graph if node not in kept for output in node.outputs)]:
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(kind)
    for node in graph:
        to = node.attributes.get("to")
        if node not in kept and node.op_type == "Cast" and to is not None and to.as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", kind)


def _is_constant(value: ir.Value) -> bool:
    """True for a constant in the graph itself."""
    return value.const_value is not None and not isinstance(value.const_value, ir.ExternalTensor)


def _is_floating(value: ir.Value) -> bool:
    """True for floating-point numbers; the heads of graphs compute with integers, some of whose types are not stated."""
    return value.dtype is not None and value.dtype.is_floating_point()


def _of_positions(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that compute floating-point numbers from integers and constants alone."""
    found: set[ir.Node] = set()
    for node in graph:
        if all(output.dtype != ir.DataType.FLOAT for output in node.outputs):
            continue
        read = [value for value in node.inputs if value is not None and not _is_constant(value)]
        if read and all(value.producer() in found or not _is_floating(value) for value in read):
            found.add(node)
    return found


def _mean_squares(graph: ir.Graph, scales: set[str]) -> set[ir.Node]:
    """The nodes from the squares of what norms are given to their scales, which have these names."""
    found: set[ir.Node] = set()
    for node in graph:
        if node.outputs[0].name not in scales:
            continue
        way: list[ir.Node] = []
        step: ir.Node | None = node
        while step is not None and step.op_type in ("Sqrt", "Add", "ReduceMean"):
            way.append(step)
            step = next((value.producer() for value in step.inputs if value is not None and value.producer()), None)
        if step is not None and (step.op_type == "Pow" or (step.op_type == "Mul" and len(set(step.inputs)) == 1)):
            found.update([*way, step])
    return found


def _fence(graph: ir.Graph, kept: set[ir.Node], kind: ir.DataType) -> set[ir.Value]:
    """Puts casts around nodes that stay float32, in place: they join ``kept``. Returns the constants that stay so too."""
    constants: set[ir.Value] = set()
    entering = dict.fromkeys(value for node in graph if node in kept for value in node.inputs if value is not None)
    leaving = [value for node in graph if node in kept for value in node.outputs]
    for value in entering:
        if value.dtype != ir.DataType.FLOAT or value.producer() in kept:
            continue
        inside, outside = ([use for use in value.uses() if (use.node in kept) == wanted] for wanted in (True, False))
        if _is_constant(value) and not outside:
            constants.add(value)
            continue
        tape, name = Tape(), f"{value.name}/float32"
        if _is_constant(value):
            assert value.const_value is not None
            copy = tape.initializer(ir.tensor(value.const_value.numpy()), name=name)
            constants.add(copy)
        else:
            copy = tape.op("Cast", [value], {"to": ir.DataType.FLOAT})
            copy.name = name
            kept.update(tape.nodes)
        let_read([(use.node, use.idx) for use in inside], copy, value)
        install(graph, tape, named(f"{name}/cast"), after=value)
    for value in leaving:
        readers = [(use.node, use.idx) for use in value.uses() if use.node not in kept]
        if value.dtype != ir.DataType.FLOAT or not (readers or value.is_graph_output()):
            continue
        tape = Tape()
        cast = tape.op("Cast", [value], {"to": kind})
        cast.type = ir.TensorType(kind)
        install(graph, tape, named(f"{value.name}/cast"), after=value)
        replace_value(value, cast, readers, left=f"{value.name}/float32")
    return constants


def _decompose_gelu(model: ir.Model) -> None:
    """Writes Gelu out, in place: ONNX Runtime has no CPU kernel of it in float64."""
    for node in [node for node in model.graph if node.op_type == "Gelu" and node.domain == ""]:
        old, tape = node.outputs[0], Tape()
        new = _gelu(node, tape)
        install(model.graph, tape, numbered(f"{node.name}/"), after=old)
        replace_value(old, new)
        model.graph.remove(node, safe=True)


def _gelu(node: ir.Node, tape: Tape) -> ir.Value:
    """What a Gelu gives, by operators that have float64 kernels.

    Tanh form: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))); exact form: x/2 (1 + erf(x / sqrt 2)).
    """
    x = node.inputs[0]
    assert x is not None
    numbers = _Numbers(tape, f"{node.name}/")
    approximate = node.attributes.get("approximate")
    if approximate is not None and approximate.as_string() == "tanh":
        cube = tape.op("Mul", [tape.op("Mul", [x, x]), x])
        inner = tape.op("Add", [x, tape.op("Mul", [cube, numbers.of(0.044715)])])
        curve = tape.op("Tanh", [tape.op("Mul", [inner, numbers.of(math.sqrt(2 / math.pi))])])
    else:
        curve = _erf(tape.op("Div", [x, numbers.of(math.sqrt(2))]), numbers, tape)
    half = tape.op("Mul", [x, numbers.of(0.5)])
    return tape.op("Mul", [half, tape.op("Add", [curve, numbers.of(1.0)])])


class _Numbers:
    """float64 constants on a tape, whose names begin with ``prefix``."""

    def __init__(self, tape: Tape, prefix: str) -> None:
        self._tape, self._prefix, self._count = tape, prefix, 0

    def of(self, number: float) -> ir.Value:
        """A constant."""
        self._count += 1
        return self._tape.initializer(
            ir.tensor(np.asarray(number, np.float64)), name=f"{self._prefix}number_{self._count}"
        )


_ERF_END = 6.0  # erf is 1 from here on, in float64
_ERF_LEAST = 2 / (2 + _ERF_END)


@functools.cache
def _erf_coefficients() -> tuple[float, ...]:
    """erfc(z) exp(z^2) as a polynomial of u in [-1, 1], a linear function of 2 / (2 + z), for z from 0 to _ERF_END."""
    from numpy.polynomial import chebyshev

    points = chebyshev.chebpts1(19)
    sizes = 2 / (_ERF_LEAST + (points + 1) * (1 - _ERF_LEAST) / 2) - 2
    values = [math.erfc(z) * math.exp(z * z) for z in sizes]
    return tuple(map(float, chebyshev.cheb2poly(chebyshev.chebfit(points, values, 18))))


def _erf(x: ir.Value, numbers: _Numbers, tape: Tape) -> ir.Value:
    """erf(x), of which ONNX Runtime has no float64 kernel, within 1e-14: sign(x) (1 - exp(-z^2) p(z)), z = |x|."""
    z = tape.op("Min", [tape.op("Abs", [x]), numbers.of(_ERF_END)])
    part = tape.op("Div", [numbers.of(2.0), tape.op("Add", [z, numbers.of(2.0)])])
    slope = 2 / (1 - _ERF_LEAST)
    u = tape.op("Sub", [tape.op("Mul", [part, numbers.of(slope)]), numbers.of(_ERF_LEAST * slope + 1)])
    *lower, found = map(numbers.of, _erf_coefficients())
    for number in reversed(lower):
        found = tape.op("Add", [tape.op("Mul", [found, u]), number])
    rest = tape.op("Mul", [tape.op("Exp", [tape.op("Neg", [tape.op("Mul", [z, z])])]), found])
    size = tape.op("Sub", [numbers.of(1.0), rest])
    return tape.op("Where", [tape.op("Less", [x, numbers.of(0.0)]), tape.op("Neg", [size]), size])
