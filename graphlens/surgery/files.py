"""Hooked folders on disk: loading a graph, saving one atomically, and giving a folder its own entry of the weights."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from graphlens.errors import ModelFileError
from graphlens.file.folder import MODEL_FILE, link_or_copy, model_path, partial_of, remove_stale, write_whole, writing
from graphlens.file.manifest import METADATA_KEY
from graphlens.file.stored import in_files, path_of
from graphlens.surgery.fingerprint import verify_weights
from graphlens.surgery.graph import ensure_hooks_resolve, read_manifest
from graphlens.surgery.untrusted import CheckReport, check_graph, check_size, refuse_sparse


def load(path: str | os.PathLike[str], verify: bool = True) -> ir.Model:
    """Loads a hooked model: the graph in memory, the weights referenced where they lie.

    Args:
        path: A hooked folder or its graph file.
        verify: False leaves out the checks of a stranger's graph (see check_graph), and the comparison of the weights
            files with the manifest's fingerprints.

    Returns:
        The model.

    Raises:
        ModelFileError: There is no hooked file, or it fails a check.
    """
    model, file = _read(path)
    manifest = read_manifest(model, str(file))
    if verify:
        report = check_graph(model, file)
        unknown = set(report.external_files) - set(manifest.files)
        if unknown:
            raise ModelFileError(
                f"{file}: its manifest has no fingerprint of {sorted(unknown)}. Export the model again."
            )
        verify_weights(file.parent, manifest.files)
    return ensure_hooks_resolve(model, str(file))


def load_plain(path: str | os.PathLike[str]) -> ir.Model:
    """Loads a model that may have no manifest: a baked or drivable file, say. It is checked as a stranger's.

    Args:
        path: A folder with a ``model.onnx``, or a graph file.

    Returns:
        The model.

    Raises:
        ModelFileError: There is no model, or it fails a check.
    """
    model, file = _read(path)
    if METADATA_KEY in model.metadata_props:
        return load(path)
    check_graph(model, file)
    return model


def _read(path: str | os.PathLike[str]) -> tuple[ir.Model, Path]:
    """(the model of a file, the file's path); only its size and sparse tensors are checked."""
    file = model_path(path)
    check_size(file)
    try:
        proto = onnx.load(file, load_external_data=False)
        refuse_sparse(proto, file)
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, file.parent)
    except ModelFileError:
        raise
    except Exception as error:  # protobuf and onnx-ir raise many kinds for one cause: the file does not parse
        raise ModelFileError(f"{file}: not an ONNX model, or cut short ({type(error).__name__}: {error}).") from error
    return model, file


def save(model: ir.Model, path: str | os.PathLike[str]) -> Path:
    """Writes a hooked model so that the file is there whole or, on an error, as it was before.

    Args:
        model: The model. Its weights files are linked or copied beside it where they lie elsewhere.
        path: A folder, or the path of the graph, which ends in ``.onnx``.

    Returns:
        The path of the graph.

    Raises:
        ExportError: It cannot be written.
    """
    target = Path(path)
    if target.suffix != ".onnx":
        target = target / MODEL_FILE
    replaced: list[Path] = []
    with writing(target), contextlib.ExitStack() as undo:
        target.parent.mkdir(parents=True, exist_ok=True)
        for name, source in sorted(weights_files(model).items()):
            place = target.parent / name
            if source.resolve() == place.resolve():
                continue
            if place.exists():
                # Should the graph not get written, the old one keeps the weights that belong to it.
                kept = partial_of(place)
                link_or_copy(place, kept)
                undo.callback(os.replace, kept, place)
                replaced.append(kept)
            link_or_copy(source, place)
        write_graph(model, target)
        undo.pop_all()
        for kept in replaced:
            kept.unlink()
        remove_stale(target.parent)
    return target


def weights_files(model: ir.Model) -> dict[str, Path]:
    """The weights files that a model refers to.

    Args:
        model: A model.

    Returns:
        The name of each file -> its path.
    """
    return {str(tensor.location): path_of(tensor) for _, tensor in in_files(model)}


def mapped(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    """The content of a tensor that lies in a file, over the mapped file. Nothing is read yet.

    onnx-ir itself refuses to read a file that has a second hard link, as our weights files have.

    Args:
        tensor: The tensor of an initializer.

    Returns:
        A tensor with the same content.
    """
    start, dtype = int(tensor.offset or 0), tensor.dtype.numpy()
    shape = tuple(int(str(size)) for size in tensor.shape)
    raw = np.memmap(path_of(tensor), np.uint8, mode="r")
    size = math.prod(shape) * dtype.itemsize
    return ir.Tensor(np.frombuffer(raw[start : start + size], dtype).reshape(shape), name=tensor.name)


def write_graph(model: ir.Model, target: Path) -> None:
    """Writes a model's graph, and not its weights. The file is there whole or, on an error, as it was before.

    Args:
        model: The model.
        target: The file.

    Raises:
        OSError: It cannot be written.
    """
    write_whole(target, ir.to_proto(model).SerializeToString(deterministic=True))


def check(path: str | os.PathLike[str]) -> CheckReport:
    """Checks a hooked file from a stranger: its structure (see check_graph) and every byte of its weights files.

    Args:
        path: A hooked folder or its graph file.

    Returns:
        What the check saw.

    Raises:
        ModelFileError: Something is not right; the message says what.
    """
    model, file = load(path), model_path(path)
    verify_weights(file.parent, read_manifest(model).files, whole=True)
    return check_graph(model, file)
