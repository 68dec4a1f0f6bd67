"""Exporting: from a checkpoint to a verified hooked folder, which appears whole or not at all."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from graphlens.errors import ExportError, RuntimeUnavailable, warn
from graphlens.file import version
from graphlens.file.copies import Announce
from graphlens.file.folder import (
    MODEL_FILE,
    copy_settings,
    refuse_occupied,
    staged_folder,
    user_path,
    working_folder,
    writing,
)
from graphlens.file.leftovers import size_of
from graphlens.file.manifest import Manifest
from graphlens.file.tokenizer import load_tokenizer
from graphlens.pipelines.adapters import installed
from graphlens.pipelines.hub import Source, resolve
from graphlens.pipelines.memory import peak_memory
from graphlens.pipelines.placing import CONVERTED_FILE, DTYPE, PlacedWeights, is_float32, place_weights
from graphlens.views.progress import note

if TYPE_CHECKING:
    import onnx_ir as ir
    import transformers

    from graphlens.export.checkpoint import Checkpoint
    from graphlens.export.families import Spec
    from graphlens.file.manifest import ModelConfig
    from graphlens.pipelines.verify import Verification

UNVERIFIED_FILE = f".{MODEL_FILE}.unverified"  # renamed when the export is complete: a killed one does not open
# What exporting needs besides what opening does, and what the manifest says the versions of.
_NEEDED = ("torch", "transformers", "onnxscript")
_VERSIONS_OF = (*_NEEDED, "onnx-ir")


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        folder: The hooked folder.
        seconds: How long tracing and writing took, verification not counted.
        peak_bytes: The peak memory of that.
        copied_bytes: Bytes of weights that were written; 0 if they were hardlinked or cloned.
        written: What was written into the folder altogether, as text.
        verification: What the verification found; None if it was skipped.
    """

    folder: Path
    seconds: float
    peak_bytes: int
    copied_bytes: int
    written: str
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
    link: bool = False,
    n_ctx: int | None = None,
) -> ExportReport:
    """Exports a checkpoint to a hooked folder, and tries out the result.

    The folder gets ``model.onnx`` with every hook point as an output, a copy of the weights files (which shares their
    blocks where the file system can) and the tokenizer files. An export that is replaced stays until the new one is
    complete.

    Args:
        name: A name on the Hugging Face hub, TransformerLens's alias of one, or a checkpoint folder.
        out: The folder to write. It may be the checkpoint folder itself: the graph is then added to it.
        verify: Compare the logits with transformers' and try every hook point; a file that fails is not kept.
        force: Replace an export that is there already.
        revision: The hub's branch, tag or commit.
        token: The hub's access token, or True for the one of the last login.
        cache_dir: The hub's cache folder.
        announce: Called with a line of text before each long step.
        link: Hardlink the weights files, where the file system can, instead of copying them. onnx.load refuses such a
            folder, and so do the tools that use it.
        n_ctx: The most tokens that a run takes when the folder is opened; at most what the model was trained for. None for
            that, but for no more than 2,048, as in TransformerLens. Who opens the folder may set it otherwise.

    Returns:
        Where the export is, and what it took.

    Raises:
        ExportError: The checkpoint cannot be exported, or the folder cannot be written.
        VerificationError: The exported file does not behave as the checkpoint does.
        RuntimeUnavailable: A package that exporting needs is not installed.
    """
    target = user_path(out)
    replace = target.exists() and (not target.is_dir() or any(target.iterdir()))
    in_place = replace and target.resolve() == user_path(name).resolve()
    if replace and not in_place:  # before anything is fetched
        if not (target / MODEL_FILE).is_file():
            refuse_occupied(target)
        if not force:
            raise ExportError(f"{target}: holds an export already. Pass force=True (--force) to replace it.")
    source = resolve(name, revision, token, cache_dir)
    if target.exists() and target.resolve() == source.folder.resolve():
        return _export_in_place(source, target, verify, announce, n_ctx)
    return export_to_new_folder(source, target, verify, announce, link, replace, n_ctx)


def export_to_new_folder(
    source: Source,
    target: Path,
    verify: bool,
    announce: Announce,
    link: bool = False,
    replace: bool = False,
    n_ctx: int | None = None,
) -> ExportReport:
    """Exports a resolved checkpoint to a folder that is absent or empty; see ``export_model``.

    Args:
        source: The checkpoint.
        target: The folder; nothing of it is left if the export fails.
        verify: Try out the result.
        announce: Called with a line of text before each long step.
        link: Hardlink the weights files, where the file system can.
        replace: Put it in the place of a folder that is there, once it is complete.
        n_ctx: See ``export_model``.
    """
    with staged_folder(target, replace=replace) as stage, writing(target):
        return _export(source, stage, target, verify, announce, link, n_ctx)


def _export_in_place(source: Source, target: Path, verify: bool, announce: Announce, n_ctx: int | None) -> ExportReport:
    """Adds the graph to the checkpoint folder itself. What an earlier export put there stays until it is complete."""
    from graphlens import surgery
    from graphlens.export.checkpoint import read_checkpoint
    from graphlens.file.stored import in_files

    checkpoint = read_checkpoint(source.folder)
    own = checkpoint.files
    if CONVERTED_FILE in own and not is_float32(checkpoint):
        raise ExportError(f"{target / CONVERTED_FILE}: the converted weights would replace these. Export elsewhere.")
    for file in own:
        if (target / file).resolve().parent != target.resolve():
            raise ExportError(
                f"{target / file}: a link that leaves the folder, which no graph may follow. Export elsewhere."
            )
    with writing(target), working_folder(target) as stage:
        report = _export(source, stage, target, verify, announce, True, n_ctx)
        model = surgery.load(stage, verify=False)
        for _, tensor in in_files(model):
            if str(tensor.location) in own:  # the checkpoint's own, in float32: it stays where it is
                tensor.base_dir = str(target)
        surgery.save(model, target, link=True)
        written = size_of(target / MODEL_FILE) + report.copied_bytes
    return dataclasses.replace(report, written=f"{written / 1e6:,.1f} MB written")


def report_lines(report: ExportReport) -> list[str]:
    """What an export did, in lines of text for people."""
    lines = [
        f"Wrote {report.folder} in {report.seconds:.1f} s, peak memory {report.peak_bytes / 1e6:,.0f} MB",
        report.written,
    ]
    if report.verification is None:
        lines.append("Not verified (--no-verify)")
    else:
        lines += report.verification.lines()
    return lines


def _export(
    source: Source, stage: Path, target: Path, verify: bool, announce: Announce, link: bool, n_ctx: int | None
) -> ExportReport:
    """Writes the export into ``stage``, which will become ``target``."""
    checkpoint = _checked(source, verify)
    started = time.perf_counter()
    unverified = stage / UNVERIFIED_FILE
    with peak_memory() as peak:
        placed = _write(source, checkpoint, stage, unverified, announce, link, n_ctx)
    seconds = time.perf_counter() - started
    found = _verified(unverified, source, announce) if verify else None
    os.replace(unverified, stage / MODEL_FILE)
    return ExportReport(target, seconds, peak.bytes, placed.copied_bytes, placed.files.line(stage), found)


def _checked(source: Source, verify: bool) -> Checkpoint:
    """The checkpoint of a source, once it is known that everything the export will need is there."""
    from graphlens.export.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(source.folder)
    load_tokenizer(source.folder)  # raises for a broken one
    missing = [name for name in _NEEDED if not installed(name)]
    if missing:
        raise RuntimeUnavailable(
            f"exporting needs {', '.join(missing)}, which is not installed: pip install 'graphlens-onnx[export]'. "
            "Opening an exported folder does not."
        )
    if verify:
        from graphlens.runtime.providers import onnxruntime

        onnxruntime()
    return checkpoint


def _verified(model: Path, source: Source, announce: Announce) -> Verification:
    """What the verification of a written graph finds; raises VerificationError."""
    from graphlens.export.checkpoint import family_of
    from graphlens.pipelines.verify import verify_export

    family = family_of(source.folder, source.name)
    announce(f"Verifying against {'a reference in NumPy' if family.own else 'transformers'}")
    if family.own:
        from graphlens.pipelines.lens_checkpoint import reference_of

        return verify_export(model, reference_of(source.folder), effects=False)  # those of its graph were tried
    return verify_export(model, source.folder)


def _write(
    source: Source,
    checkpoint: Checkpoint,
    stage: Path,
    path: Path,
    announce: Announce,
    link: bool,
    n_ctx: int | None,
) -> PlacedWeights:
    """Writes the graph to ``path`` and all that belongs beside it into ``stage``."""
    from graphlens import surgery
    from graphlens.export.trace import parameter_shapes
    from graphlens.surgery.files import write_graph
    from graphlens.surgery.graph import write_manifest

    if checkpoint.family.own:
        from graphlens.pipelines.lens_checkpoint import write_hooked

        return write_hooked(source, checkpoint, stage, path, n_ctx)
    hf_config = checkpoint.hf_config()
    # Before anything is written: the family may refuse it.
    spec = checkpoint.family.spec_of(hf_config, source.name)
    config = checkpoint.family.model_config(spec, source.model_name, DTYPE, n_ctx)
    tied = hf_config.tie_word_embeddings = checkpoint.is_tied(bool(getattr(hf_config, "tie_word_embeddings", False)))
    unused = checkpoint.ensure_complete(parameter_shapes(hf_config, spec), spec.blocks, tied)
    if unused:
        shown = ", ".join(unused[:3]) + (f" and {len(unused) - 3} more" if len(unused) > 3 else "")
        warn(f"{source.name}: the weights hold tensors that the model does not use: {shown}.")
    placed = place_weights(checkpoint, stage, announce, link)
    model, manifest = _hooked_graph(source, checkpoint, hf_config, spec, config, placed, stage, announce)
    write_manifest(model, manifest)
    write_graph(surgery.expose(model, manifest.hooks), path)
    copy_settings(source.folder, stage)
    return placed


def _hooked_graph(
    source: Source,
    checkpoint: Checkpoint,
    hf_config: transformers.PretrainedConfig,
    spec: Spec,
    config: ModelConfig,
    placed: PlacedWeights,
    stage: Path,
    announce: Announce,
) -> tuple[ir.Model, Manifest]:
    """The traced graph, bound to the weights files in ``stage``, and what the file will say about itself."""
    from graphlens import surgery
    from graphlens.export import build
    from graphlens.export.families import weight_views
    from graphlens.export.repeat import repeat_blocks, traced_layers
    from graphlens.export.trace import trace
    from graphlens.surgery.inputs import attach_preamble

    family = checkpoint.family
    tied = bool(hf_config.tie_word_embeddings)
    announce(f"Tracing {source.name}: {config.n_layers} layers")
    model = trace(hf_config, spec, traced_layers(spec))
    build.optimise(model)
    repeat_blocks(model, spec)
    hooks = build.name_hook_points(model, config.n_layers)

    def place_of(parameter: str, shape: tuple[int, ...]) -> tuple[str, str]:
        return placed.at(*checkpoint.locate(parameter, shape, tied))

    places = build.bind_weights(model, place_of, placed.entries, stage)
    if tied:
        # A tied parameter is one initializer in the graph, under one of its names; the views know both.
        for parameter, other in family.tied.items():
            shared = places.get(parameter) or places[other]
            places |= {parameter: shared, other: shared}
    build.tidy(model)
    manifest = Manifest(
        config=config,
        hooks=hooks,
        weights=weight_views(spec, places),
        files={file: surgery.fingerprint(stage / file) for file in sorted(placed.entries)},
        source=source.name,
        revision=source.revision,
        exporter={
            "graphlens": version.__version__,
            **{name: importlib.metadata.version(name) for name in _VERSIONS_OF},
        },
    )
    return attach_preamble(model, config.window_size, config.is_encoder), manifest
