"""The cache of exports: the hooked folder of any model as asked for, made on first use and found again later."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from graphlens.analysis.arrays import ArrayInput
from graphlens.errors import ExportError, ModelFileError, checked_number
from graphlens.export.checkpoint import SHARD_INDEX, WEIGHTS_FILE
from graphlens.file.digests import digest_of
from graphlens.file.folder import (
    CONFIG_FILE,
    MODEL_FILE,
    SETTINGS,
    cache_root,
    copy_settings,
    staged_folder,
    writing,
)
from graphlens.file.inside import inside
from graphlens.file.leftovers import remove_stale, remove_whole
from graphlens.file.manifest import Json, Manifest
from graphlens.file.manifest_format import FORMAT_VERSION
from graphlens.file.processing import steps_for
from graphlens.pipelines.export import export_to_new_folder
from graphlens.pipelines.hub import Source, manifest_of, resolve
from graphlens.pipelines.in_memory import TransformersModel, saved
from graphlens.pipelines.placing import DTYPE
from graphlens.views.progress import note, spinner

# Raised whenever the exporter would write other bytes for the same checkpoint. The versions of torch and transformers
# are left out on purpose: an export is opened later where neither is installed.
EXPORTER_REVISION = 3


def cached_export(
    name: str | os.PathLike[str],
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    dtype: str = DTYPE,
    processing: Sequence[str] = (),
    first_n_layers: int | None = None,
    hf_model: TransformersModel | None = None,
) -> Path:
    """The hooked folder of a model as asked for: the folder itself if it is that, else one in the cache.

    Args:
        name: A name on the Hugging Face hub, TransformerLens's alias of one, a checkpoint folder or a hooked folder.
        revision: The hub's branch, tag or commit.
        token: The hub's access token, or True for the one of the last login.
        cache_dir: The hub's cache folder.
        dtype: The dtype to compute in, by its NumPy name or "bfloat16".
        processing: Steps of weight processing (see process_weights), in order.
        first_n_layers: Keep that many blocks; None keeps all.
        hf_model: A transformers model in memory whose weights are used instead of the name's.

    Returns:
        The folder, made if it was absent.

    Raises:
        ExportError: The model cannot be found or exported, or the folder holds something else than asked for.
        InputError: ``hf_model`` is no transformers model, or too precise for the export; ``first_n_layers`` is no number.
    """
    if first_n_layers is not None:
        first_n_layers = checked_number(first_n_layers, "first_n_layers")
    resolved = (
        contextlib.nullcontext(resolve(name, revision, token, cache_dir))
        if hf_model is None
        else saved(hf_model, os.fspath(name))
    )
    steps = tuple(processing)
    remove_stale(
        cache_root() / "hooked"
    )  # also where nothing is exported now: a killed export may never be asked for again
    with resolved as source:
        folder, done = _plain_export(source, steps, dtype)
        if first_n_layers is not None and first_n_layers != done.config.n_layers:
            folder = _derived(
                folder, f"first-{first_n_layers}", lambda path, stage: _shorten(path, stage, first_n_layers)
            )
        if steps and not done.processing:
            steps, notes = steps_for(done, steps)
            for sentence in notes:
                note(sentence)
            if steps:
                folder = processed_export(folder, steps)
        if dtype != DTYPE and done.config.dtype == DTYPE:
            folder = converted_export(folder, dtype)
        return folder


def export_folder(name: str, checkpoint: Path, dtype: str, processing: Sequence[str]) -> Path:
    """Where the export of a checkpoint lies in the cache: a path that depends on everything that changes its bytes.

    It covers every byte of the checkpoint's files. Weights are read whole, unless they were not touched since.

    Args:
        name: The model's name, for people who look into the cache.
        checkpoint: The checkpoint folder.
        dtype: The NumPy name of the export's dtype.
        processing: Steps of weight processing, in order.

    Raises:
        ExportError: The folder is no checkpoint folder.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([EXPORTER_REVISION, FORMAT_VERSION, dtype, list(processing)]).encode())
    if not (checkpoint / CONFIG_FILE).is_file():
        raise ExportError(f"{checkpoint}: no config.json here, so this is not a Hugging Face checkpoint folder.")
    settings = [file for file in (*SETTINGS, SHARD_INDEX) if (checkpoint / file).is_file()]
    for file in (*settings, *sorted(path.name for path in checkpoint.glob("*.safetensors"))):
        digest.update(f"\0{file}\0{digest_of(inside(checkpoint, file))}".encode())
    label = "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip(".-") or "model"
    return cache_root() / "hooked" / f"{label}-{digest.hexdigest()[:24]}"


def derived_folder(folder: Path, label: str) -> Path:
    """Where what is made of a hooked folder lies in the cache.

    Args:
        folder: The hooked folder. The path depends on every byte of its graph, which holds the digests of its weights.
        label: What is made of it, e.g. ``first-2`` or ``float16``.
    """
    digest = hashlib.sha256(json.dumps([EXPORTER_REVISION, FORMAT_VERSION, label]).encode())
    digest.update(digest_of(inside(folder, MODEL_FILE)).encode())
    return cache_root() / "hooked" / f"{folder.name.rsplit('-', 1)[0]}-{label[:24]}-{digest.hexdigest()[:24]}"


def _plain_export(source: Source, processing: tuple[str, ...], dtype: str) -> tuple[Path, Manifest]:
    """The folder itself where it holds what is asked for or its plain export, else the export in the cache."""
    from graphlens.surgery.files import stored_manifest

    manifest = _hooked(source.folder)
    if manifest is not None:
        wanted = processing if manifest.processing in ((), processing) else steps_for(manifest, processing)[0]
        if (manifest.processing, manifest.config.dtype) in (((), DTYPE), (wanted, dtype)):
            return source.folder, manifest
        if not (source.folder / WEIGHTS_FILE).is_file():
            raise ExportError(
                f"{source.folder}: holds {manifest.config.dtype} weights processed with {list(manifest.processing)}, which "
                f"cannot become {dtype} with {list(processing)}. Export the original again, or open it with from_onnx."
            )
    folder = export_folder(source.name, source.folder, DTYPE, ())
    made = _made(folder)
    if made is not None:
        return folder, made
    with spinner(f"Exporting {source.name} (once)"):
        export_to_new_folder(source, folder, verify=True, announce=lambda _: None, link=True)
    if export_folder(source.name, source.folder, DTYPE, ()) != folder:
        remove_whole(folder)  # under this name it would be served for what the checkpoint was before
        raise ExportError(f"{source.folder}: something wrote into this checkpoint while it was exported. Try again.")
    return folder, stored_manifest(folder)


def _made(folder: Path) -> Manifest | None:
    """The manifest of a folder that was made in the cache; None where there is none. One that is damaged is removed.

    Its weights may be another name of the checkpoint's own file, and change with it when that is written over.
    """
    from graphlens.surgery.files import stored_manifest

    there = folder.is_dir()  # asked first: folders appear whole, when another process has made them
    if not (folder / MODEL_FILE).is_file():
        if there:
            remove_whole(folder)  # something took the graph out of it, and no other can be put in
        return None
    try:
        return stored_manifest(folder, intact=True)
    except ModelFileError:
        note(f"{folder}: this export in the cache does not hold any more what was written. It is made again.")
        remove_whole(folder)
        return None


def _hooked(folder: Path) -> Manifest | None:
    """The manifest of a folder that holds a hooked file, else None. A stranger's model.onnx is not one."""
    if not (folder / MODEL_FILE).is_file():
        return None
    if (folder / CONFIG_FILE).is_file():
        return manifest_of(folder / MODEL_FILE)
    from graphlens.surgery.files import stored_manifest

    return stored_manifest(folder)  # without a checkpoint beside it there is nothing to export: this says what is wrong


def _derived(folder: Path, label: str, write: Callable[[Path, Path], object]) -> Path:
    """The folder in the cache that ``write(graph file, new folder)`` makes of a hooked folder, made if absent."""
    from graphlens import surgery

    surgery.load(folder)  # refuses one that is damaged: what was once made of it would be served nevertheless
    target = derived_folder(folder, label)
    if _made(target) is None:
        with spinner(f"Writing {target.name} (once)"), staged_folder(target) as stage, writing(target):
            write(folder / MODEL_FILE, stage)
    return target


def config_export(settings: Mapping[str, Json], state: Callable[[], Mapping[str, ArrayInput]]) -> Path:
    """The folder in the cache of the model of a TransformerLens config, whatever its weights are; made if absent.

    Args:
        settings: See ``from_config.read_config``.
        state: Gives the weights that it gets if it is made.

    Raises:
        ExportError: The config asks for something that graphlens does not compute, or the cache cannot be written.
        RuntimeUnavailable: A package that exporting needs is not installed.
    """
    from graphlens.pipelines.from_config import bind, graph_of

    folder = cache_root() / "hooked" / graph_of(settings).name
    if _made(folder) is None:
        try:
            bind(settings, state(), folder)
        except ExportError:
            if _made(folder) is None:  # otherwise another process made the same meanwhile
                raise
    return folder


def processed_export(folder: Path, steps: Sequence[str]) -> Path:
    """The folder in the cache of a hooked folder's model with processed weights, made if absent.

    Args:
        folder: The hooked folder.
        steps: Which of file/processing.py's STEPS, all of which its architecture goes through.

    Raises:
        ExportError: It cannot be processed, or the cache cannot be written.
    """
    from graphlens.surgery.process import process_into

    return _derived(folder, "-".join(steps), lambda path, stage: process_into(path, stage, steps))


def converted_export(folder: Path, dtype: str) -> Path:
    """The folder in the cache of a hooked folder's model in another dtype, made if absent.

    Args:
        folder: The hooked folder, in float32.
        dtype: Its NumPy name, or "bfloat16".

    Raises:
        ExportError: It cannot be converted, or the cache cannot be written.
    """
    from graphlens.surgery.precision import convert_into

    return _derived(folder, dtype, lambda path, stage: convert_into(path, stage, dtype))


def adopted_export(file: str | os.PathLike[str]) -> Path:
    """The folder in the cache of a file that another program exported, adopted; made if absent.

    Args:
        file: See ``adopt``.

    Raises:
        ModelFileError: It cannot be adopted.
        ExportError: The cache cannot be written.
    """
    from graphlens.file.stored import files_beside
    from graphlens.pipelines.adopt import adopt
    from graphlens.surgery.foreign import foreign_path, load_foreign

    original = foreign_path(file)
    beside = files_beside(load_foreign(original), original)
    settings = [path for folder in (original.parent, original.parent.parent) for path in [folder / CONFIG_FILE]]
    digest = hashlib.sha256(json.dumps([EXPORTER_REVISION, FORMAT_VERSION, "adopted 2"]).encode())
    for path in (original, *beside.values(), *(path for path in settings if path.is_file())):
        digest.update(f"\0{path.name}\0{digest_of(path)}".encode())
    label = "".join(c if c.isalnum() or c in "-_." else "-" for c in original.stem).strip(".-") or "model"
    folder = cache_root() / "hooked" / f"{label}-{digest.hexdigest()[:24]}"
    if _made(folder) is None:
        with spinner(f"Adopting {original.name} (once)"):
            try:
                adopt(original, folder, announce=lambda _: None)
            except ExportError:
                if _made(folder) is None:  # otherwise another process made the same meanwhile
                    raise
    return folder


def _shorten(path: Path, stage: Path, layers: int) -> None:
    """Writes a hooked file's first blocks into another folder."""
    from graphlens import surgery

    surgery.save(surgery.first_layers(surgery.load(path), layers), stage, link=True)
    copy_settings(path.parent, stage)
