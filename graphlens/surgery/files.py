"""Hooked folders on disk: loading a graph, saving one atomically, and giving a folder its own entry of the weights."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from graphlens.errors import ExportError, ModelFileError
from graphlens.file.copies import place
from graphlens.file.folder import MODEL_FILE, model_path, user_path, write_whole, writing
from graphlens.file.inside import inside, read_regular
from graphlens.file.large_tensors import light_bytes
from graphlens.file.leftovers import locked, provisional, remove, remove_stale
from graphlens.file.manifest import METADATA_KEY, SEALED_SINCE, Manifest
from graphlens.file.manifest_format import ensure_known_format
from graphlens.file.stored import in_files, path_of
from graphlens.surgery.fingerprint import fingerprint, verify_weights
from graphlens.surgery.graph import ensure_hooks_resolve, manifest_in, read_manifest, write_manifest
from graphlens.surgery.held_weights import beside
from graphlens.surgery.labels import without_labels, write_labels
from graphlens.surgery.placement import ensure_placed
from graphlens.surgery.seal import KEY, is_sealed, sealed_bytes
from graphlens.surgery.untrusted import CheckReport, check_graph, check_size, check_structure

# protobuf and onnx-ir raise many kinds for one cause: the file does not parse.
_UNPARSED = (DecodeError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def load(path: str | os.PathLike[str], verify: bool = True) -> ir.Model:
    """Loads a hooked model: the graph in memory, the weights referenced where they lie.

    Args:
        path: A hooked folder or its graph file.
        verify: False leaves out the checks of a stranger's graph (see check_graph), of its seal, and of the weights: that
            the files are those that the manifest names, and that each initializer is a whole tensor of one.

    Returns:
        The model.

    Raises:
        ModelFileError: There is no hooked file, or it fails a check.
    """
    model, file, sealed = read_model(path, verify)
    manifest = read_manifest(model, str(file))
    if verify:
        if not sealed and manifest.format_version >= SEALED_SINCE:
            raise _unsealed(file)
        _check(model, file)
    return ensure_hooks_resolve(model, str(file))


def stored_manifest(path: str | os.PathLike[str], intact: bool = False) -> Manifest:
    """What a hooked file says about itself; its structure is not checked.

    Args:
        path: A hooked folder or its graph file.
        intact: True makes sure that the file and its weights hold what was written: its seal, and their digests.

    Returns:
        The manifest.

    Raises:
        ModelFileError: There is no hooked file, or it is not intact.
    """
    # onnx-ir is not asked: a stranger's graph may keep it busy for long, and nothing has bounded this one yet.
    proto, file, sealed = _parsed(path, intact)
    manifest = manifest_in({entry.key: entry.value for entry in proto.metadata_props}, str(file), proto.producer_name)
    if intact and not sealed and manifest.format_version >= SEALED_SINCE:
        raise _unsealed(file)
    if intact:
        verify_weights(file.parent, manifest.files)
    return manifest


def _unsealed(file: Path) -> ModelFileError:
    """The error for a file that must have a seal and has none."""
    return ModelFileError(
        f"{file}: it has no seal, so it was written by another program, or is damaged. Put the original back or export "
        "the model again. If you changed it yourself: graphlens seal FOLDER checks it and seals it anew."
    )


def seal(path: str | os.PathLike[str]) -> CheckReport:
    """Seals a hooked file that another program wrote or that has no seal yet, once it passed every other check.

    Args:
        path: A hooked folder or its graph file. It is replaced by the same graph, in the manifest's newest format; not where
            it has a seal that fits.

    Returns:
        What the check saw.

    Raises:
        ModelFileError: Something is not right; the message says what.
        ExportError: The file cannot be written.
    """
    model, file, _ = read_model(path, verify=False)
    manifest = read_manifest(model, str(file))
    report = _check(model, file, whole=True)
    ensure_hooks_resolve(model, str(file))
    if not _has_its_seal(file):
        write_manifest(model, manifest)
        with writing(file):
            write_graph(model, file)
    return report


def _has_its_seal(file: Path) -> bool:
    """True if a file has a seal, and it fits."""
    try:
        return is_sealed(read_regular(file), str(file))
    except ModelFileError:  # it does not fit: a new one is asked for
        return False


def _check(model: ir.Model, file: Path, whole: bool = False) -> CheckReport:
    """Refuses a hooked model whose graph or weights are not in order; ``whole`` reads every byte of the weights again."""
    manifest = read_manifest(model, str(file))
    report = check_graph(model, file, "edited" if manifest.adopted is None else "adopted")
    unknown = set(report.external_files) - set(manifest.files)
    if unknown:
        raise ModelFileError(f"{file}: its manifest has no fingerprint of {sorted(unknown)}. Export the model again.")
    verify_weights(file.parent, manifest.files, whole)
    ensure_placed(model, file.parent)
    return report


def load_plain(path: str | os.PathLike[str]) -> ir.Model:
    """Loads a model that may have no manifest: a baked or drivable file, say. It is checked as a stranger's.

    Args:
        path: A folder with a ``model.onnx``, or a graph file.

    Returns:
        The model.

    Raises:
        ModelFileError: There is no model, or it fails a check.
    """
    model, file, _ = read_model(path)
    if METADATA_KEY in model.metadata_props:
        return load(path)
    check_graph(model, file)
    return model


def names_graphlens(file: Path) -> bool:
    """True for a graph file with graphlens's name in it, as its manifest and its producer have it, damaged or not.

    One that is empty, or all zeros as after a power cut, says nothing of who wrote it, and counts as ours.

    Args:
        file: The file.

    Returns:
        False for a file that another program wrote.

    Raises:
        ModelFileError: It cannot be read.
    """
    data = read_regular(inside(file.parent, file.name))
    return METADATA_KEY.encode() in data or not data.strip(b"\0")


def _parsed(path: str | os.PathLike[str], verify: bool, light: bool = False) -> tuple[onnx.ModelProto, Path, bool]:
    """(the content of a graph file, its path, whether it is sealed); its size, its format and its seal are checked."""
    file = model_path(path)
    inside(file.parent, file.name)
    check_size(file)
    data = light_bytes(file) if light else read_regular(file)
    try:
        proto = onnx.load_model_from_string(data)
    except _UNPARSED as error:
        raise _not_a_model(file, error) from error
    for entry in proto.metadata_props:
        if entry.key == METADATA_KEY:
            ensure_known_format(entry.value, str(file))  # a newer one may be sealed otherwise
    return proto, file, verify and is_sealed(data, str(file))


def _not_a_model(file: Path, error: Exception) -> ModelFileError:
    """The error for a file that holds no graph."""
    return ModelFileError(f"{file}: not an ONNX model, or cut short ({type(error).__name__}: {error!s:.300}).")


def read_model(path: str | os.PathLike[str], verify: bool = True, light: bool = False) -> tuple[ir.Model, Path, bool]:
    """Reads a graph file; of its content only the size, the structure and the seal are checked.

    Args:
        path: A folder with a ``model.onnx``, or a graph file.
        verify: False leaves out the seal.
        light: True leaves large tensors in the file, and tells them as external data that lie there. No seal is read then.

    Returns:
        The model, whose weights stay where they lie; the file's path; and whether it is sealed.

    Raises:
        ModelFileError: It is no model, or one that could not be read in bounded time, or its seal does not fit.
    """
    proto, file, sealed = _parsed(path, verify and not light, light)
    try:
        check_structure(proto, file)
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, file.parent)
    except ModelFileError:
        raise
    except _UNPARSED as error:
        raise _not_a_model(file, error) from error
    model.metadata_props.pop(KEY, None)  # it is the file's, and not that of what becomes of the graph
    return without_labels(model), file, sealed


def save(model: ir.Model, path: str | os.PathLike[str], link: bool = False, sealed: bool = True) -> Path:
    """Writes a hooked model so that, whatever happens meanwhile, the file opens as it was before or as it is now.

    Args:
        model: The model. Its weights files are copied beside it where they lie elsewhere. Files of the same names that
            are there are replaced.
        path: A folder, or the path of the graph, which ends in ``.onnx``.
        link: True hardlinks the weights files, where the file system can, instead of copying them. onnx itself refuses
            to read a file that is hardlinked.
        sealed: False leaves out graphlens's seal: for a file that is another program's.

    Returns:
        The path of the graph.

    Raises:
        ExportError: It cannot be written.
    """
    target = user_path(path)
    if target.suffix != ".onnx":
        target = target / MODEL_FILE
    folder = target.parent
    with writing(target), contextlib.ExitStack() as undo:
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale(folder)
        model, brought = _with_held(model, folder)
        for file in brought:
            undo.callback(_remove_unless_named, file, target)
        files = {
            name: source
            for name, source in sorted(weights_files(model).items())
            if not _is_in_place(source, folder / name, link)
        }
        # The old graph needs the old files. The new ones have another name until a graph that names them is in place.
        aside = {name: provisional(folder / name).name for name in files if os.path.lexists(folder / name)}
        for name in files:
            undo.callback(_remove_unless_named, folder / aside.get(name, name), target)
        place({aside.get(name, name): source for name, source in files.items()}, folder, link)
        with locked(folder):
            write_graph(_with_names(model, aside), target, sealed)
            undo.pop_all()
            # It is saved. If giving the files their own names fails, longer names are all that shows.
            with contextlib.suppress(OSError, ExportError):
                if aside:
                    place({name: folder / other for name, other in aside.items()}, folder, link=True)
                    write_graph(model, target, sealed)
        remove_stale(folder)
    for other in aside.values():
        _remove_unless_named(folder / other, target)
    return target


def _with_held(model: ir.Model, folder: Path) -> tuple[ir.Model, list[Path]]:
    """(the model with what it holds elsewhere in files of a folder, these files); its manifest names them."""
    made, files = beside(model, folder)
    if files and METADATA_KEY in made.metadata_props:
        manifest = read_manifest(made)
        write_manifest(
            made, manifest.with_files({**manifest.files, **{file.name: fingerprint(file) for file in files}})
        )
    return made, files


def _is_in_place(source: Path, target: Path, link: bool) -> bool:
    """True if a weights file lies where it shall; for links, also if it is hardlinked there already."""
    return source.resolve() == target.resolve() or (link and target.exists() and source.samefile(target))


def _remove_unless_named(path: Path, graph: Path) -> None:
    """Removes a weights file that a graph file does not name."""
    if not (graph.is_file() and os.fsencode(path.name) in graph.read_bytes()):
        remove(path)


def _with_names(model: ir.Model, names: Mapping[str, str]) -> ir.Model:
    """The model with other names of its weights files: old -> new. The model itself where there are none."""
    if not names:
        return model
    renamed = model.clone()
    for value, tensor in in_files(renamed):
        if tensor.location in names:
            value.const_value = ir.ExternalTensor(
                names[str(tensor.location)],
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=str(tensor.name),
                base_dir=tensor.base_dir,
            )
    if METADATA_KEY in renamed.metadata_props:
        manifest = read_manifest(renamed)
        files = {names.get(name, name): file for name, file in manifest.files.items()}
        views = {key: replace(view, file=names.get(view.file, view.file)) for key, view in manifest.weights.items()}
        write_manifest(renamed, replace(manifest, files=files, weights=views))
    return renamed


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


def write_graph(model: ir.Model, target: Path, sealed: bool = True, named: Manifest | None = None) -> None:
    """Writes a model's graph, and not its weights. The file is there whole or, on an error, as it was before.

    Args:
        model: The model. A manifest of an older format becomes one of the newest, in place: that of files with a seal.
        target: The file.
        sealed: False leaves out the seal.
        named: For a graph without a manifest, what the hooked file said that it was made of: the nodes of its hook points are
            labelled by it, for viewers.

    Raises:
        OSError: It cannot be written.
    """
    if METADATA_KEY in model.metadata_props:
        manifest = read_manifest(model, str(target))
        if manifest.format_version < SEALED_SINCE:
            write_manifest(model, manifest)
        named = manifest
    proto = ir.to_proto(model)
    if named is not None and sealed:
        write_labels(proto, named)
    write_whole(target, sealed_bytes(proto) if sealed else proto.SerializeToString(deterministic=True))


def check(path: str | os.PathLike[str]) -> CheckReport:
    """Checks a hooked file from a stranger: its structure (see check_graph), its seal, and every byte of its weights files.

    Args:
        path: A hooked folder or its graph file.

    Returns:
        What the check saw.

    Raises:
        ModelFileError: Something is not right; the message says what.
    """
    return _check(load(path), model_path(path), whole=True)
