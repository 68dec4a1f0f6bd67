"""Precision: a float32 hooked file rewritten to compute, or to store its weights, in another floating-point type."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tape import Tape

from graphlens.errors import ExportError
from graphlens.file.folder import copy_settings
from graphlens.file.manifest import Manifest, ModelConfig
from graphlens.file.safetensors import SafetensorsFile, TensorEntry, write_safetensors
from graphlens.surgery.files import load, write_graph
from graphlens.surgery.fingerprint import fingerprint
from graphlens.surgery.graph import ensure_hooks_resolve, read_manifest, write_manifest

WEIGHTS_FILE = "weights.{dtype}.safetensors"
_TYPES: dict[str, tuple[ir.DataType, str, Any]] = {
    "float64": (ir.DataType.DOUBLE, "F64", np.float64),
    "float16": (ir.DataType.FLOAT16, "F16", np.float16),
    "bfloat16": (ir.DataType.BFLOAT16, "BF16", ml_dtypes.bfloat16),
}


def convert_into(source: Path, stage: Path, dtype: str) -> None:
    """Writes the model of the float32 hooked file ``source`` into the folder ``stage`` in another dtype.

    float64 and float16 are computed in; bfloat16 is stored and cast to float32 in the graph, since ONNX Runtime's CPU
    kernels do not compute in it. Raises ExportError for a model that is not float32.
    """
    model = load(source)
    manifest = read_manifest(model)
    if manifest.config.dtype != "float32":
        raise ExportError(f"{source}: holds {manifest.config.dtype}; only float32 files are converted.")
    kind, stored, numpy_type = _TYPES[dtype]
    file = WEIGHTS_FILE.format(dtype=dtype)
    _rewrite_weights(manifest, source.parent, stage / file, stored, numpy_type)
    _rebind(model, manifest, source.parent, stage, file, kind)
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
    views = {name: replace(view, file=file) for name, view in manifest.weights.items()}
    write_manifest(
        model, replace(manifest, config=config, hooks=hooks, weights=views, files={file: fingerprint(stage / file)})
    )
    write_graph(ensure_hooks_resolve(model, "the converted graph"), stage / "model.onnx")
    copy_settings(source.parent, stage)


def _rewrite_weights(manifest: Manifest, folder: Path, target: Path, stored: str, numpy_type: Any) -> None:
    files = [SafetensorsFile(folder / name) for name in manifest.files]
    entries = {
        key: TensorEntry(stored, entry.shape, 0, int(np.prod(entry.shape)) * np.dtype(numpy_type).itemsize)
        for file in files
        for key, entry in file.entries.items()
        if entry.dtype == "F32"
    }

    def arrays() -> Iterator[npt.NDArray[Any]]:
        for file in files:
            yield from (file.array(key).astype(numpy_type) for key, e in file.entries.items() if e.dtype == "F32")

    write_safetensors(target, entries, arrays())


def _rebind(model: ir.Model, manifest: Manifest, folder: Path, stage: Path, file: str, kind: ir.DataType) -> None:
    """Points every external initializer (in place) at the tensor of the same key in the new file."""
    keys = {
        (name, entry.offset): key
        for name in manifest.files
        for key, entry in SafetensorsFile(folder / name).entries.items()
    }
    entries = SafetensorsFile(stage / file).entries
    for value in model.graph.initializers.values():
        old = value.const_value
        if not isinstance(old, ir.ExternalTensor):
            continue
        entry = entries[keys[str(old.location), int(old.offset or 0)]]
        value.const_value = ir.ExternalTensor(
            file,
            entry.offset,
            entry.length,
            kind,
            shape=ir.Shape(entry.shape),
            name=str(value.name),
            base_dir=str(stage),
        )
        value.type = ir.TensorType(kind)


def _cast_weights(model: ir.Model) -> None:
    """Puts a Cast to float32 behind every bfloat16 initializer, in place; it folds away when the model is loaded."""
    for value in list(model.graph.initializers.values()):
        if value.dtype != ir.DataType.BFLOAT16:
            continue
        uses = tuple(value.uses())
        tape = Tape()
        cast = tape.op("Cast", [value], {"to": ir.DataType.FLOAT})
        cast.name, cast.shape, cast.type = f"{value.name}/float32", value.shape, ir.TensorType(ir.DataType.FLOAT)
        for node, index in uses:
            node.replace_input_with(index, cast)
        for node in tape.nodes:
            node.name = f"{value.name}/cast"
        model.graph.insert_before(model.graph[0], list(tape.nodes))


def _exact(number: float, config: ModelConfig) -> float:
    """The number that a float32 constant of the graph stands for: eps and the attention scales are known exactly."""
    known = [config.eps, *(1 / math.sqrt(config.d_head) / layer for layer in range(1, config.n_layers + 1))]
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
    """Writes Gelu out, in place: ONNX Runtime has no CPU kernel of it in float64.

    Tanh form: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))); exact form: x/2 (1 + erf(x / sqrt 2)).
    """
    for node in [node for node in model.graph if node.op_type == "Gelu" and node.domain == ""]:
        x, old = node.inputs[0], node.outputs[0]
        assert x is not None
        tape = Tape()

        def number(value: float, label: str, name: str = str(node.name), tape: Tape = tape) -> ir.Value:
            return tape.initializer(ir.tensor(np.asarray(value, np.float64)), name=f"{name}/{label}")

        approximate = node.attributes.get("approximate")
        if approximate is not None and approximate.as_string() == "tanh":
            cube = tape.op("Mul", [tape.op("Mul", [x, x]), x])
            inner = tape.op("Add", [x, tape.op("Mul", [cube, number(0.044715, "cubic")])])
            curve = tape.op("Tanh", [tape.op("Mul", [inner, number(math.sqrt(2 / math.pi), "slope")])])
        else:
            curve = tape.op("Erf", [tape.op("Div", [x, number(math.sqrt(2), "root")])])
        half = tape.op("Mul", [x, number(0.5, "half")])
        new = tape.op("Mul", [half, tape.op("Add", [curve, number(1.0, "one")])])
        new.shape, new.type = old.shape, old.type
        for initializer in tape.initializers:
            model.graph.initializers[str(initializer.name)] = initializer
        for index, added in enumerate(tape.nodes):
            added.name = f"{node.name}/{added.op_type}_{index}"
            added.outputs[0].name = added.outputs[0].name or added.name
        model.graph.insert_after(node, list(tape.nodes))
        for index, output in enumerate(model.graph.outputs):
            if output is old:
                model.graph.outputs[index] = new
        name = old.name
        old.replace_all_uses_with(new)
        model.graph.remove(node, safe=True)
        new.name = name
