"""Exporting: the sequence that turns a checkpoint into a verified hooked folder, atomically."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphlens.errors import ExportError, InputError, ModelFileError, RuntimeUnavailable
from graphlens.file.folder import TOKENIZER_FILES, copy_settings, refuse_occupied
from graphlens.file.manifest import Manifest
from graphlens.file.safetensors import SafetensorsFile, TensorEntry, write_safetensors
from graphlens.file.tokenizer import load_tokenizer
from graphlens.file.version import __version__
from graphlens.pipelines import cache
from graphlens.pipelines.hub import Source, resolve
from graphlens.pipelines.memory import peak_memory
from graphlens.views.progress import note, spinner

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphlens.export.checkpoint import Checkpoint
    from graphlens.pipelines.verify import Verification

MODEL_FILE = "model.onnx"
UNVERIFIED_FILE = ".model.onnx.unverified"  # renamed when the export is complete: a killed one does not open
CONVERTED_FILE = "weights.safetensors"
DTYPE = "float32"

Announce = Callable[[str], None]


@dataclass(frozen=True)
class ExportReport:
    """What an export did: where it is, seconds and peak memory (bytes) of tracing and writing, bytes of weights that
    were copied rather than linked, and the verification's findings (None when it was skipped)."""

    folder: Path
    seconds: float
    peak_bytes: int
    copied_bytes: int
    verification: Verification | None


def export_model(
    name: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    verify: bool = True,
    force: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    announce: Announce = note,
) -> ExportReport:
    """Exports a checkpoint (hub name, TransformerLens alias or local folder) to a hooked folder ``out``.

    The folder gets ``model.onnx`` with every hook point as an output, its own entry of the weights files (a hardlink
    where the file system allows, else a copy) and the tokenizer files. ``out`` may be the checkpoint folder itself: the
    graph is then added to it. Unless ``verify`` is False the result is compared with transformers and every hook point
    is tried; a file that fails is not kept. ``force`` replaces an existing export.
    ``announce`` is told about long steps. Raises ExportError, VerificationError, RuntimeUnavailable.
    """
    source = resolve(name, revision, token, cache_dir)
    target = Path(out).expanduser()
    if target.exists() and target.resolve() == source.folder.resolve():
        from graphlens.file.folder import writing

        with writing(target):
            return _export(source, target, target, verify, announce)
    if (target / MODEL_FILE).is_file():
        if not force:
            raise ExportError(f"{target}: holds an export already. Pass force=True (--force) to replace it.")
        shutil.rmtree(target)
    refuse_occupied(target)
    return _export_staged(source, target, verify, announce)


def cached_export(
    name: str | os.PathLike[str],
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    dtype: str = DTYPE,
    processing: Sequence[str] = (),
    first_n_layers: int | None = None,
    hf_model: Any = None,
) -> Path:
    """The hooked folder of a model as asked for: the folder itself if it is that, else one in the cache, made if absent.

    ``processing`` and ``dtype`` are steps from the plain float32 export; ``hf_model`` is a transformers model in memory
    whose weights are used instead of the name's.
    """
    with contextlib.ExitStack() as stack:
        if hf_model is not None:
            source = _saved(hf_model, os.fspath(name), stack)
        else:
            source = resolve(name, revision, token, cache_dir)
        folder = _plain_export(source, tuple(processing), dtype)
        done = _manifest(folder)
        if first_n_layers is not None and first_n_layers != done.config.n_layers:
            folder = _step(folder, f"first-{first_n_layers}", lambda path, stage: _shorten(path, stage, first_n_layers))
        if processing and not done.processing:
            from graphlens.surgery.process import process_into

            steps = tuple(processing)
            folder = _step(folder, "-".join(steps), lambda path, stage: process_into(path, stage, steps))
        if dtype != DTYPE and done.config.dtype == DTYPE:
            from graphlens.surgery.precision import convert_into

            folder = _step(folder, dtype, lambda path, stage: convert_into(path, stage, dtype))
        return folder


def _plain_export(source: Source, processing: tuple[str, ...], dtype: str) -> Path:
    """The folder itself where it holds what is asked for or its plain export, else the export in the cache."""
    manifest = _hooked(source.folder)
    if manifest is not None:
        if (manifest.processing, manifest.config.dtype) in (((), DTYPE), (processing, dtype)):
            return source.folder
        if not (source.folder / "model.safetensors").is_file():
            raise ExportError(
                f"{source.folder}: holds {manifest.config.dtype} weights processed with {list(manifest.processing)}, which "
                f"cannot become {dtype} with {list(processing)}. Export the original again, or open it with from_onnx."
            )
    folder = cache.export_folder(source.name, source.folder, DTYPE, ())
    if not (folder / MODEL_FILE).is_file():
        with spinner(f"Exporting {source.name} (once)"):
            _export_staged(source, folder, verify=True, announce=lambda _: None)
    return folder


def _manifest(folder: Path) -> Manifest:
    from graphlens import surgery

    return surgery.read_manifest(surgery.load(folder, verify=False))


def _step(folder: Path, label: str, write: Callable[[Path, Path], None]) -> Path:
    """The folder in the cache that ``write(model path, folder)`` makes of a hooked folder, made if absent."""
    from graphlens.file.folder import staged_folder, writing

    target = cache.derived_folder(folder, label)
    if not (target / MODEL_FILE).is_file():
        with spinner(f"Writing {target.name} (once)"), staged_folder(target) as stage, writing(target):
            write(folder / MODEL_FILE, stage)
    return target


def _shorten(path: Path, stage: Path, layers: int) -> None:
    from graphlens import surgery

    surgery.save(surgery.first_layers(surgery.load(path), layers), stage)
    copy_settings(path.parent, stage)


def _saved(hf_model: Any, name: str, stack: contextlib.ExitStack) -> Source:
    """A transformers model written to a temporary folder, with the tokenizer files of the named folder beside it."""
    if not hasattr(hf_model, "save_pretrained"):
        raise InputError(f"hf_model must be a transformers model, not {type(hf_model).__name__}.")
    for parameter, tensor in hf_model.named_parameters():
        if tensor.element_size() > np.dtype(DTYPE).itemsize:
            raise InputError(
                f"hf_model's {parameter} is {tensor.dtype}, which {DTYPE} would round, and every model is exported from "
                f"{DTYPE}: pass hf_model.float(), and dtype= for the precision to compute in."
            )
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    hf_model.save_pretrained(folder)
    try:
        named = resolve(name)
    except ExportError:
        named = None  # the name is then only a label: the weights are here
    if named is not None:
        for file in TOKENIZER_FILES:
            if (named.folder / file).is_file():
                shutil.copyfile(named.folder / file, folder / file)
    return Source(Path(name).name, folder)


def _export_staged(source: Source, target: Path, verify: bool, announce: Announce) -> ExportReport:
    """Exports into a temporary folder that becomes ``target``, whole, or vanishes."""
    from graphlens.file.folder import staged_folder, writing

    with staged_folder(target) as stage, writing(target):
        return _export(source, stage, target, verify, announce)


def _hooked(folder: Path) -> Manifest | None:
    """The manifest of a folder that holds a hooked file, else None. A stranger's model.onnx is not one."""
    if not (folder / MODEL_FILE).is_file():
        return None
    try:
        return _manifest(folder)
    except ModelFileError:
        if (folder / "config.json").is_file():
            return None
        raise  # without a checkpoint beside it there is nothing to export instead: this says what is wrong


def _need_export_packages() -> None:
    missing = [name for name in ("torch", "transformers", "onnxscript") if not _importable(name)]
    if missing:
        raise RuntimeUnavailable(
            f"exporting needs {', '.join(missing)}, which is not installed: pip install 'graphlens-onnx[export]'. "
            "Opening an exported folder does not."
        )


def _importable(name: str) -> bool:
    import importlib.util

    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def _export(source: Source, stage: Path, target: Path, verify: bool, announce: Announce) -> ExportReport:
    """Writes the export into ``stage`` (announced as ``target``)."""
    from graphlens.export.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(source.folder)
    load_tokenizer(source.folder)  # a broken tokenizer is found now rather than after the export
    _need_export_packages()
    if verify:
        from graphlens.runtime.providers import onnxruntime

        onnxruntime()
    unverified = stage / UNVERIFIED_FILE
    started = time.perf_counter()
    try:
        with peak_memory() as peak:
            model, copied = _write(source, checkpoint, stage, unverified, announce)
        del model
        seconds = time.perf_counter() - started
        report = None
        if verify:
            from graphlens.pipelines.verify import verify_export

            announce("Verifying against transformers")
            report = verify_export(unverified, source.folder)
        os.replace(unverified, stage / MODEL_FILE)
        return ExportReport(target, seconds, peak.bytes, copied, report)
    finally:
        unverified.unlink(missing_ok=True)


def _write(source: Source, checkpoint: Checkpoint, stage: Path, path: Path, announce: Announce) -> tuple[ir.Model, int]:
    """Traces, binds and writes the graph to ``path`` beside its weights. Returns the model and the bytes copied."""
    import transformers

    from graphlens import surgery
    from graphlens.export import build, families
    from graphlens.export.checkpoint import model_config
    from graphlens.export.trace import trace
    from graphlens.surgery.files import write_graph
    from graphlens.surgery.graph import write_manifest
    from graphlens.surgery.inputs import attach_preamble

    hf_config = transformers.AutoConfig.from_pretrained(source.folder)
    config = model_config(checkpoint, hf_config, source.name, DTYPE)
    entries, copied = _place_weights(checkpoint, stage, announce)
    announce(f"Tracing {source.name}: {config.n_layers} layers")
    model = trace(hf_config, checkpoint.family)
    build.optimise(model)
    hooks = build.name_hook_points(model, config.n_layers)
    tied = bool(getattr(hf_config, "tie_word_embeddings", False))
    converted = CONVERTED_FILE in entries

    def place_of(parameter: str, shape: tuple[int, ...]) -> tuple[str, str]:
        file, key = checkpoint.locate(parameter, shape, tied)
        return (CONVERTED_FILE, key) if converted else (file, key)

    places = build.bind_weights(model, place_of, entries, stage)
    # A tied parameter is one initializer in the graph, under one of its names; the views know both.
    for parameter, other in checkpoint.family.tied.items():
        if tied:
            shared = places.get(parameter) or places[other]
            places |= {parameter: shared, other: shared}
    build.tidy(model)
    model = attach_preamble(model)
    manifest = Manifest(
        config=config,
        hooks=hooks,
        weights=families.weight_views(checkpoint.family, config, places),
        files={file: surgery.fingerprint(stage / file) for file in sorted(entries)},
        source=source.name,
        revision=source.revision,
        exporter=_versions(),
    )
    write_manifest(model, manifest)
    model = surgery.expose(model, hooks)
    write_graph(model, path)
    copy_settings(source.folder, stage)
    return model, copied


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "onnxscript", "onnx-ir")
    return {"graphlens": __version__, **{name: importlib.metadata.version(name) for name in packages}}


def _place_weights(
    checkpoint: Checkpoint, stage: Path, announce: Announce
) -> tuple[dict[str, dict[str, TensorEntry]], int]:
    """Gives ``stage`` its weights files: (tensors by file, bytes copied).

    float32 checkpoints are linked (or copied across file systems) as they are; others become one new float32 file.
    """
    from graphlens.file.folder import link_or_copy

    if all(entry.dtype == "F32" for _, entry in checkpoint.tensors.values()):
        entries: dict[str, dict[str, TensorEntry]] = {file: {} for file in checkpoint.files}
        for key, (file, entry) in checkpoint.tensors.items():
            entries[file][key] = entry
        copied = 0
        for file in entries:
            if stage.resolve() != checkpoint.folder.resolve() and link_or_copy(checkpoint.folder / file, stage / file):
                size = (stage / file).stat().st_size
                announce(f"Copied {file} ({size / 1e6:,.0f} MB): it cannot be hardlinked into {stage.parent}")
                copied += size
        return entries, copied
    announce("Converting the weights to float32")
    floats = {k: (f, e) for k, (f, e) in checkpoint.tensors.items() if e.dtype in ("F64", "F32", "F16", "BF16")}
    wanted = {
        key: TensorEntry("F32", entry.shape, 0, int(np.prod(entry.shape)) * 4) for key, (_, entry) in floats.items()
    }
    path = stage / CONVERTED_FILE
    path.unlink(missing_ok=True)  # an earlier export into this folder made one
    write_safetensors(path, wanted, (_as_float32(checkpoint.folder / file, key) for key, (file, _) in floats.items()))
    return {CONVERTED_FILE: dict(SafetensorsFile(path).entries)}, path.stat().st_size


def _as_float32(path: Path, key: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    file = SafetensorsFile(path)
    array = file.array(key)
    if file.entries[key].dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def report_lines(report: ExportReport) -> list[str]:
    """What an export did, for people."""
    lines = [f"Wrote {report.folder} in {report.seconds:.1f} s, peak memory {report.peak_bytes / 1e6:,.0f} MB"]
    if report.verification is None:
        lines.append("Not verified (--no-verify)")
    else:
        lines += report.verification.lines()
    return lines
