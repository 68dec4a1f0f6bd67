"""The cache of exports: the hooked folder of any model as asked for, made on first use and found again later."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from graphlens.errors import ExportError, InputError, ModelFileError
from graphlens.export.checkpoint import SHARD_INDEX, WEIGHTS_FILE
from graphlens.file.folder import (
    CONFIG_FILE,
    MODEL_FILE,
    TOKENIZER_FILES,
    cache_root,
    copy_settings,
    staged_folder,
    writing,
)
from graphlens.file.manifest import FORMAT_VERSION, Manifest
from graphlens.pipelines.export import export_to_new_folder
from graphlens.pipelines.hub import Source, resolve
from graphlens.pipelines.placing import DTYPE
from graphlens.surgery.fingerprint import quick_fingerprint
from graphlens.views.progress import spinner

# Raised whenever the exporter would write other bytes for the same checkpoint. The versions of torch and transformers
# are left out on purpose: an export is opened later where neither is installed.
EXPORTER_REVISION = 2


class TorchTensor(Protocol):
    """What is asked of a parameter of a transformers model."""

    dtype: object

    def element_size(self) -> int:
        """Bytes of an element."""


class TransformersModel(Protocol):
    """What is asked of a transformers model in memory."""

    def save_pretrained(self, folder: str | os.PathLike[str], /) -> object:
        """Writes the model as a checkpoint folder."""

    def named_parameters(self) -> Iterable[tuple[str, TorchTensor]]:
        """The model's parameters by name."""


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
        InputError: ``hf_model`` is no transformers model, or too precise for the export.
    """
    resolved = (
        contextlib.nullcontext(resolve(name, revision, token, cache_dir))
        if hf_model is None
        else _saved(hf_model, os.fspath(name))
    )
    steps = tuple(processing)
    with resolved as source:
        folder = _plain_export(source, steps, dtype)
        done = _manifest(folder)
        if first_n_layers is not None and first_n_layers != done.config.n_layers:
            folder = _derived(
                folder, f"first-{first_n_layers}", lambda path, stage: _shorten(path, stage, first_n_layers)
            )
        if steps and not done.processing:
            from graphlens.surgery.process import process_into

            folder = _derived(folder, "-".join(steps), lambda path, stage: process_into(path, stage, steps))
        if dtype != DTYPE and done.config.dtype == DTYPE:
            from graphlens.surgery.precision import convert_into

            folder = _derived(folder, dtype, lambda path, stage: convert_into(path, stage, dtype))
        return folder


def export_folder(name: str, checkpoint: Path, dtype: str, processing: Sequence[str]) -> Path:
    """Where the export of a checkpoint lies in the cache: a path that depends on everything that changes its bytes.

    Reads the small files and samples of the weights, a few milliseconds.

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
    for file in (CONFIG_FILE, SHARD_INDEX, *TOKENIZER_FILES):
        path = checkpoint / file
        if path.is_file():
            digest.update(f"\0{file}\0".encode() + path.read_bytes())
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not (checkpoint / CONFIG_FILE).is_file():
        raise ExportError(f"{checkpoint}: no config.json here, so this is not a Hugging Face checkpoint folder.")
    for path in weights:
        found = quick_fingerprint(path)
        digest.update(f"\0{path.name}\0{found.size}{found.header_sha256}{found.samples_sha256}".encode())
    label = "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip(".-") or "model"
    return cache_root() / "hooked" / f"{label}-{digest.hexdigest()[:24]}"


def derived_folder(folder: Path, label: str) -> Path:
    """Where what is made of a hooked folder lies in the cache.

    Args:
        folder: The hooked folder. The path depends on its graph, which holds its weights' fingerprints.
        label: What is made of it, e.g. ``first-2`` or ``float16``.
    """
    digest = hashlib.sha256(json.dumps([EXPORTER_REVISION, FORMAT_VERSION, label]).encode())
    digest.update((folder / MODEL_FILE).read_bytes())
    return cache_root() / "hooked" / f"{folder.name.rsplit('-', 1)[0]}-{label[:24]}-{digest.hexdigest()[:24]}"


@contextlib.contextmanager
def _saved(hf_model: TransformersModel, name: str) -> Iterator[Source]:
    """A transformers model written to a temporary folder, with the tokenizer files of the named model beside it."""
    if not hasattr(hf_model, "save_pretrained"):
        raise InputError(f"hf_model must be a transformers model, not {type(hf_model).__name__}.")
    for parameter, tensor in hf_model.named_parameters():
        if tensor.element_size() > np.dtype(DTYPE).itemsize:
            raise InputError(
                f"hf_model's {parameter} is {tensor.dtype}, which {DTYPE} would round, and every model is exported from "
                f"{DTYPE}: pass hf_model.float(), and dtype= for the precision to compute in."
            )
    with tempfile.TemporaryDirectory() as written:
        folder = Path(written)
        hf_model.save_pretrained(folder)
        # Where nothing has that name it is only a label: the weights are here. Tokenizer files are then left out.
        with contextlib.suppress(ExportError):
            named = resolve(name).folder
            for file in TOKENIZER_FILES:
                if (named / file).is_file():
                    shutil.copyfile(named / file, folder / file)
        yield Source(Path(name).name, folder)


def _plain_export(source: Source, processing: tuple[str, ...], dtype: str) -> Path:
    """The folder itself where it holds what is asked for or its plain export, else the export in the cache."""
    manifest = _hooked(source.folder)
    if manifest is not None:
        if (manifest.processing, manifest.config.dtype) in (((), DTYPE), (processing, dtype)):
            return source.folder
        if not (source.folder / WEIGHTS_FILE).is_file():
            raise ExportError(
                f"{source.folder}: holds {manifest.config.dtype} weights processed with {list(manifest.processing)}, which "
                f"cannot become {dtype} with {list(processing)}. Export the original again, or open it with from_onnx."
            )
    folder = export_folder(source.name, source.folder, DTYPE, ())
    if not (folder / MODEL_FILE).is_file():
        with spinner(f"Exporting {source.name} (once)"):
            export_to_new_folder(source, folder, verify=True, announce=lambda _: None)
    return folder


def _hooked(folder: Path) -> Manifest | None:
    """The manifest of a folder that holds a hooked file, else None. A stranger's model.onnx is not one."""
    if not (folder / MODEL_FILE).is_file():
        return None
    try:
        return _manifest(folder)
    except ModelFileError:
        if (folder / CONFIG_FILE).is_file():
            return None
        raise  # without a checkpoint beside it there is nothing to export instead: this says what is wrong


def _manifest(folder: Path) -> Manifest:
    """The manifest of a hooked folder, its weights not checked."""
    from graphlens import surgery

    return surgery.read_manifest(surgery.load(folder, verify=False))


def _derived(folder: Path, label: str, write: Callable[[Path, Path], None]) -> Path:
    """The folder in the cache that ``write(graph file, new folder)`` makes of a hooked folder, made if absent."""
    target = derived_folder(folder, label)
    if not (target / MODEL_FILE).is_file():
        with spinner(f"Writing {target.name} (once)"), staged_folder(target) as stage, writing(target):
            write(folder / MODEL_FILE, stage)
    return target


def _shorten(path: Path, stage: Path, layers: int) -> None:
    """Writes a hooked file's first blocks into another folder."""
    from graphlens import surgery

    surgery.save(surgery.first_layers(surgery.load(path), layers), stage)
    copy_settings(path.parent, stage)
