"""Weights of a graph that lie elsewhere, written into files beside the graph."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from graphlens.file.copies import ensure_room
from graphlens.file.folder import replacing
from graphlens.file.held import HeldTensor, held
from graphlens.file.safetensors import SafetensorsFile, TensorEntry, write_safetensors
from graphlens.file.stored import bind


def beside(model: ir.Model, folder: Path) -> tuple[ir.Model, list[Path]]:
    """Writes what lies elsewhere into safetensors files of a folder.

    Args:
        model: A model; it is left as it is.
        folder: Where the files go. Files of their names are replaced.

    Returns:
        (a copy of the model whose initializers lie in the files, the files). The model itself where nothing lies elsewhere.
    """
    found: dict[str, dict[str, HeldTensor]] = {}
    for value, tensor in held(model):
        found.setdefault(str(tensor.location), {})[str(value.name)] = tensor
    if not found:
        return model, []
    model = model.clone()
    ensure_room(folder, sum(tensor.held.nbytes for tensors in found.values() for tensor in tensors.values()))
    for file, tensors in found.items():
        entries = {
            name: TensorEntry("F32", tensor.held.shape, 0, tensor.held.nbytes) for name, tensor in tensors.items()
        }
        with replacing(folder / file) as made:
            made.unlink(missing_ok=True)
            write_safetensors(made, entries, [tensor.held for tensor in tensors.values()])
        for name, entry in SafetensorsFile(folder / file).entries.items():
            bind(model.graph.initializers[name], folder / file, entry)
    return model, [folder / file for file in found]
