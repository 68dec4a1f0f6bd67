"""Weights of a graph that lie in files: which initializer holds which tensor of which file, on onnx-ir."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx_ir as ir

from graphlens.file.held import HeldTensor
from graphlens.file.manifest import Manifest, WeightView
from graphlens.file.safetensors import Array, SafetensorsFile, TensorEntry

DATA_TYPES: Mapping[str, ir.DataType] = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "I64": ir.DataType.INT64,
    "I32": ir.DataType.INT32,
    "I16": ir.DataType.INT16,
    "I8": ir.DataType.INT8,
    "U16": ir.DataType.UINT16,
    "U8": ir.DataType.UINT8,
    "BOOL": ir.DataType.BOOL,
}
"""ONNX's names of the dtypes that a weights file may hold; integers are those of adopted files."""


def in_files(model: ir.Model) -> Iterator[tuple[ir.Value, ir.ExternalTensor]]:
    """The initializers of a model whose data lie in a file.

    Args:
        model: A model. An initializer may be bound to another tensor meanwhile.

    Yields:
        An initializer, and the tensor that says where its data lie.
    """
    for value in list(model.graph.initializers.values()):
        if isinstance(value.const_value, ir.ExternalTensor) and not isinstance(value.const_value, HeldTensor):
            yield value, value.const_value


def place_of(tensor: ir.ExternalTensor) -> tuple[str, int]:
    """Where a tensor's data begin.

    Args:
        tensor: The tensor of an initializer.

    Returns:
        The name of the file, and the offset in bytes.
    """
    return str(tensor.location), int(tensor.offset or 0)


def path_of(tensor: ir.ExternalTensor) -> Path:
    """The file that a tensor's data lie in.

    Args:
        tensor: The tensor of an initializer.

    Returns:
        The file's path.
    """
    return Path(tensor.base_dir) / tensor.location


def files_beside(model: ir.Model, graph: Path) -> dict[str, Path]:
    """The files of weights that a graph file names, itself left out.

    Args:
        model: A model as it was read.
        graph: Its graph file.

    Returns:
        The name of each, relative to the graph's folder -> its path; in the order of names.
    """
    found = {str(tensor.location): path_of(tensor) for _, tensor in in_files(model)}
    return {name: found[name] for name in sorted(found) if not found[name].samefile(graph)}


def stored_tensor(path: Path, entry: TensorEntry, name: str) -> ir.ExternalTensor:
    """A tensor of a weights file as an initializer's data; nothing is read.

    Args:
        path: The weights file.
        entry: Where the tensor lies in it.
        name: The initializer's name.

    Returns:
        The tensor.
    """
    return ir.ExternalTensor(
        path.name,
        entry.offset,
        entry.length,
        DATA_TYPES[entry.dtype],
        shape=ir.Shape(entry.shape),
        name=name,
        base_dir=str(path.parent),
    )


def bind(value: ir.Value, path: Path, entry: TensorEntry) -> None:
    """Points an initializer at a tensor of a weights file, in place, and gives it the tensor's dtype.

    Args:
        value: An initializer.
        path: The weights file.
        entry: Where the tensor lies in it.
    """
    tensor = stored_tensor(path, entry, str(value.name))
    value.const_value, value.type = tensor, ir.TensorType(tensor.dtype)


class StoredWeights:
    """The weights of a hooked model where they are stored: in the graph, and in the files of its folder.

    Args:
        model: A hooked model.
        manifest: Its manifest.
    """

    def __init__(self, model: ir.Model, manifest: Manifest) -> None:
        # Of what is stored as integers no initializer holds the numbers: for surgery, the model lacks such a weight.
        self.views: Mapping[str, WeightView] = {
            name: view for name, view in manifest.weights.items() if view.quantised is None
        }
        self._files: dict[str, SafetensorsFile] = {}
        self._initializers: dict[tuple[str, int], ir.Value] = {}
        self._folder: Path | None = None
        for value, tensor in in_files(model):
            self._initializers[place_of(tensor)] = value
            self._folder = Path(tensor.base_dir)

    def _file(self, view: WeightView) -> SafetensorsFile:
        """The file of a weight, opened once."""
        if view.file not in self._files:
            assert self._folder is not None, "a model whose weights lie in files"
            self._files[view.file] = SafetensorsFile(self._folder / view.file)
        return self._files[view.file]

    def entry(self, name: str) -> TensorEntry | None:
        """Where the tensor lies that a weight is a view of.

        Args:
            name: The weight's TransformerLens name.

        Returns:
            Its place, shape and dtype; None where the model has no such weight, or none in a file.
        """
        view = self.views.get(name)
        return None if view is None or self._folder is None else self._file(view).entries[view.tensor]

    def array(self, name: str) -> Array:
        """The tensor that a weight is a view of.

        Args:
            name: The TransformerLens name of a weight that the model has.

        Returns:
            A read-only array over the mapped file, with the tensor's own shape and dtype.
        """
        view = self.views[name]
        return self._file(view).array(view.tensor)

    def initializer(self, name: str) -> ir.Value:
        """The initializer that a weight is a view of.

        Args:
            name: The TransformerLens name of a weight that the model has.

        Returns:
            The initializer.
        """
        view = self.views[name]
        return self._initializers[view.file, self._file(view).entries[view.tensor].offset]
