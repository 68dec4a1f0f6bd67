"""Precision: a float32 hooked file rewritten to compute, or to store its weights, in another floating-point type."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from graphlens.errors import ExportError
from graphlens.file.copies import ensure_room
from graphlens.file.folder import MODEL_FILE, converted_weights, copy_settings
from graphlens.file.manifest import ModelConfig
from graphlens.file.safetensors import Array, SafetensorsFile, TensorEntry, write_safetensors
from graphlens.file.stored import DATA_TYPES, bind, in_files, place_of
from graphlens.surgery.files import load, write_graph
from graphlens.surgery.fingerprint import fingerprint
from graphlens.surgery.graph import finish, install, let_read, named, numbered, read_manifest, replace_value

_STORED = {"float64": "F64", "float16": "F16", "bfloat16": "BF16"}  # safetensors' names of dtypes


def convert_into(source: Path, stage: Path, dtype: str) -> None:
    """Writes a model into a folder in another dtype.

    float64 and float16 are computed in; bfloat16 is stored and cast to float32 in the graph, since ONNX Runtime's CPU
    kernels do not compute in it.

    Args:
        source: The graph file of a float32 model.
        stage: The folder.
        dtype: ``"float64"``, ``"float16"`` or ``"bfloat16"``.

    Raises:
        ExportError: The model is not float32.
    """
    model = load(source)
    manifest = read_manifest(model)
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
        _retype(model, kind, config)
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
    """The number that a float32 constant of the graph means: eps and the attention scales are known exactly."""
    known = [config.eps, *(1 / config.attn_scale / layer for layer in range(1, config.n_layers + 1))]
    known += [1 / layer for layer in range(1, config.n_layers + 1)]
    return next((exact for exact in known if np.float32(exact) == np.float32(number)), number)


def _retype(model: ir.Model, kind: ir.DataType, config: ModelConfig) -> None:
    """Makes every float32 value, constant and cast of the graph one of another type, in place."""
    graph = model.graph
    for value in graph.initializers.values():
        if value.dtype != ir.DataType.FLOAT or value.const_value is None:
            continue
        array = value.const_value.numpy().astype(np.float64)
        array = np.vectorize(lambda x: _exact(float(x), config), otypes=[np.float64])(array) if array.size else array
        value.const_value = ir.tensor(array.astype(kind.numpy()), name=value.name)
        value.type = ir.TensorType(kind)
    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(kind)
    for node in graph:
        to = node.attributes.get("to")
        if node.op_type == "Cast" and to is not None and to.as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", kind)


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

    def number(value: float, label: str) -> ir.Value:
        return tape.initializer(ir.tensor(np.asarray(value, np.float64)), name=f"{node.name}/{label}")

    approximate = node.attributes.get("approximate")
    if approximate is not None and approximate.as_string() == "tanh":
        cube = tape.op("Mul", [tape.op("Mul", [x, x]), x])
        inner = tape.op("Add", [x, tape.op("Mul", [cube, number(0.044715, "cubic")])])
        curve = tape.op("Tanh", [tape.op("Mul", [inner, number(math.sqrt(2 / math.pi), "slope")])])
    else:
        curve = tape.op("Erf", [tape.op("Div", [x, number(math.sqrt(2), "root")])])
    half = tape.op("Mul", [x, number(0.5, "half")])
    return tape.op("Mul", [half, tape.op("Add", [curve, number(1.0, "one")])])
