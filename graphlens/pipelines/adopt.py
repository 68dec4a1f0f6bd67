"""Adopting: from an ONNX file that another program exported to a hooked folder, which appears whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from graphlens.errors import ExportError, ModelFileError
from graphlens.file import version
from graphlens.file.adopted import Adopted
from graphlens.file.copies import Announce
from graphlens.file.digests import digest_of
from graphlens.file.folder import MODEL_FILE, copy_settings, refuse_occupied, staged_folder, user_path, writing
from graphlens.file.manifest import HookEntry, Manifest
from graphlens.file.names import POSITION_EMBEDDINGS, TOKEN_EMBEDDINGS, TYPE_EMBEDDINGS, all_names, axis_sizes
from graphlens.views.progress import note

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphlens.file.model_config import ModelConfig
    from graphlens.surgery.adopted.hooks import Seen
    from graphlens.surgery.match.records import Match, View
    from graphlens.surgery.unfusing import Unfused


_WINDOWED = (
    "Layers with a sliding window return the keys and values of their last tokens only (sliding_window_cache): generation runs "
    "the whole prompt for each token, and a KV cache goes no farther than the window.",
)
# How far what weights give may be from what the graph gives, of the largest number: in floats, in half precision, and where
# activations are rounded to integers.
_OF_FLOATS, _OF_HALVES, _OF_ROUNDED = 3e-4, 2e-2, 6e-2


@dataclass(frozen=True)
class AdoptReport:
    """What adopting found and made.

    Attributes:
        folder: The hooked folder; None for a dry run.
        original: The file that was adopted.
        config: The architecture, as far as structure and config tell.
        hooks: The hook points that were found, in firing order.
        weights: The weights that were found.
        adopted: What the manifest says about the original.
        identities: Identity between hook points -> its residual, relative.
        failed: Hook point that was found and is not named -> which identity failed there.
        remarks: What else a reader should know, a sentence each.
    """

    folder: Path | None
    original: Path
    config: ModelConfig
    hooks: tuple[str, ...]
    weights: tuple[str, ...]
    adopted: Adopted
    identities: Mapping[str, float] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def adopt(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    config: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    keep_fused: bool = False,
    force: bool = False,
    announce: Announce = note,
) -> AdoptReport:
    """Finds the hook points of a transformer that another program exported, and writes it as a hooked folder.

    The original stays as it is. Its fused operators are expanded, its weights are copied as they are (int8 stays int8), and
    every hook point that was found gets its name, once it was seen to hold what its name says.

    Args:
        file: An ONNX file, or a folder with one.
        out: The folder to write; may be left out for a dry run.
        config: The model's ``config.json``, for what structure does not say (the longest input, say). By default the one
            beside the file, if there is one.
        tokenizer: A folder with the model's tokenizer files. By default the file's own folder.
        dry_run: True writes nothing, and reports what would be found.
        keep_fused: True leaves fused operators as they are, and hooks only what is visible.
        force: True replaces a hooked folder that is there.
        announce: Called with a line of text before each long step.

    Returns:
        What was found, and where it is.

    Raises:
        ModelFileError: The file cannot be adopted; the message says why, and what can be done.
        ExportError: The folder cannot be written.
    """
    from graphlens.surgery.foreign import foreign_path, refuse_original

    original = foreign_path(file)
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="graphlens-") as stage:
            return _adopted(original, Path(stage), None, config, tokenizer, keep_fused, announce)
    if out is None:
        raise ExportError("adopt needs a folder to write: give out (-o), or ask for a dry run.")
    target = user_path(out)
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied:
        refuse_original(original, target / MODEL_FILE)
        if not force or not (target / MODEL_FILE).is_file():
            refuse_occupied(target)
        if original.resolve().is_relative_to(target.resolve()):
            raise ExportError(f"{target}: holds the original, which stays as it is. Choose another folder.")
    with staged_folder(target, replace=occupied) as stage, writing(target):
        return _adopted(original, stage, target, config, tokenizer, keep_fused, announce)


def _adopted(
    original: Path,
    stage: Path,
    target: Path | None,
    config: str | os.PathLike[str] | None,
    tokenizer: str | os.PathLike[str] | None,
    keep_fused: bool,
    announce: Announce,
) -> AdoptReport:
    """Adopts a file into ``stage``, which will become ``target``."""
    from graphlens import surgery
    from graphlens.file.stored import files_beside
    from graphlens.pipelines.adopt_config import read_config, whole_config
    from graphlens.pipelines.adopt_identities import proved
    from graphlens.pipelines.adopt_probe import channel_block, image_side, seen_values
    from graphlens.pipelines.adopt_weights import proved_weights
    from graphlens.pipelines.fresh_weights import FreshWeights
    from graphlens.surgery.adoptable import ensure_adoptable, making_sense, remarks
    from graphlens.surgery.adopted.hooks import Seen
    from graphlens.surgery.adopted.inputs import ensure_ports_fit
    from graphlens.surgery.adopted.originals import ensure_dynamic, ensure_repeats, prepare
    from graphlens.surgery.adopted.past import LAST_PAST, PAST, keeps_a_window
    from graphlens.surgery.adopted.visible import visible
    from graphlens.surgery.adopted.weights import WEIGHTS_FILE, let_go, move_weights, weight_views
    from graphlens.surgery.files import write_graph
    from graphlens.surgery.foreign import load_foreign
    from graphlens.surgery.graph import write_manifest
    from graphlens.surgery.match import match
    from graphlens.surgery.quantised import rounds_together
    from graphlens.surgery.unfusing.channels import BLOCKED
    from graphlens.surgery.unfusing.expand import unfuse

    stated = read_config(config, original)
    model = load_foreign(original)
    beside = files_beside(model, original)
    size, digest = original.stat().st_size, digest_of(original)
    data = {name: digest_of(path) for name, path in beside.items()}
    _ensure_foreign(model, original)
    ensure_adoptable(model, original)
    said = remarks(model, original)
    producer = " ".join(part for part in (model.producer_name, model.producer_version) if part) or "unknown"
    announce(f"Looking for hook points in {original.name}")
    with making_sense(original):
        prepare(model)
    ensure_repeats(model, original)
    keys = move_weights(model, stage / WEIGHTS_FILE)
    for path, known in ((original, digest), *((path, data[name]) for name, path in beside.items())):
        if digest_of(path) != known:  # which reads a file again only if it was touched
            raise ModelFileError(
                f"{path}: something wrote to it while it was adopted. Try again when that is finished."
            )
    with making_sense(original):
        unfused = unfuse(model, block=channel_block(model))
        untouched, model = model, unfused.model
        model.graph.sort()
    seen = seen_values(model, stage, str(original), image_side(model))
    try:
        with making_sense(original):
            found = match(model, {name: saw.shape for name, saw in seen.items()}, unfused.origin)
    except ModelFileError as error:
        raise error if str(error).startswith(str(original)) else type(error)(f"{original}: {error}") from error
    let_go(model)
    ensure_ports_fit(model, found.ports, str(original))
    ensure_dynamic(model, found.ports, original)
    cfg = whole_config(
        found,
        stated,
        original,
        seen,
        _table_rows(model, found, POSITION_EMBEDDINGS),
        _table_rows(model, found, TOKEN_EMBEDDINGS),
        _table_rows(model, found, TYPE_EMBEDDINGS),
    )
    if keep_fused:  # what the expanded graph told is looked for in one that is not
        # Channels in blocks are always written out: what they compute depends on the processor.
        kept = [operator for operator in unfused.expanded if not operator.startswith(f"{BLOCKED}::")]
        unfused = unfuse(untouched, keep=kept, block=channel_block(untouched))
        model = unfused.model
        model.graph.sort()
        found = visible(found, model)
    for name in found.ports.past.values():  # which may state no sizes, and was empty in the probe
        batch, dtype = seen[name].shape[0], seen[name].dtype
        seen[name] = Seen((batch, cfg.n_key_value_heads, 0, cfg.d_head), dtype)
    graph = Unnamed(model, found, cfg, seen)
    announce(f"Trying {len(found.hooks)} hook points on probes")
    proof = proved(graph, untouched, stage, original)
    model, hooks = proof.model, proof.hooks
    if proof.causal and not cfg.is_causal and found.kind != "vision":  # by a mask that matching cannot read
        cfg = replace(cfg, attention_dir="causal")
        if cfg.pre_norm_encoder:
            cfg = replace(cfg, pre_norm_encoder=False, n_token_types=None, default_prepend_bos=True)
    windowed = keeps_a_window(untouched)
    adopted = Adopted(
        file=original.name,
        sha256=digest,
        size=size,
        producer=producer,
        expanded=dict(unfused.expanded),
        kept=dict(unfused.kept),
        inputs=tuple(LAST_PAST if windowed and name == PAST else name for name in graph.taken),
        nodes=_original_nodes(proof.kept, unfused),
        missing={**found.missing, **proof.failed},
        identities=len(proof.residuals),
        worst=max(proof.residuals.values(), default=0.0),
        notes=(
            *found.notes,
            *proof.notes,
            *_left_out(untouched, graph),
            *_near_only(found, model),
            *(_WINDOWED if windowed else ()),
        ),
        headless=found.ports.logits is None,
        left_padding=proof.left_padding,
        data=data,
        apart=not rounds_together(model),
    )
    views = weight_views(graph.model, found.weights, keys, WEIGHTS_FILE)
    checked = proved_weights(
        FreshWeights(stage, views),
        proof.activations,
        cfg,
        proof.probe.tokens,
        proof.probe.types,
        proof.probe.mask,
        _OF_FLOATS if proof.allowed < 1e-3 else _OF_HALVES if proof.allowed < 0.1 else _OF_ROUNDED,
        proof.result if adopted.headless else None,
    )
    views = {name: view for name, view in views.items() if name in checked.proved}
    adopted = replace(adopted, missing={**adopted.missing, **checked.failed})
    manifest = Manifest(
        config=cfg,
        hooks=dict(hooks),
        weights=views,
        files={WEIGHTS_FILE: surgery.fingerprint(stage / WEIGHTS_FILE)},
        source=original.stem if original.stem != "model" else original.resolve().parent.name,
        exporter={"graphlens": version.__version__},
        adopted=adopted,
    )
    write_manifest(model, manifest)
    write_graph(model, stage / MODEL_FILE)
    settings = user_path(tokenizer) if tokenizer is not None else original.parent
    copy_settings(settings, stage)
    return AdoptReport(target, original, cfg, tuple(hooks), tuple(views), adopted, proof.residuals, proof.failed, said)


def _near_only(found: Match, model: ir.Model) -> list[str]:
    """That weights tell what a graph computes nearly, where it rounds activations too, in a sentence."""
    rounds = any(node.op_type in ("DynamicQuantizeLinear", "QuantizeLinear") for node in model.graph)
    if not rounds or not any(weight.quantised is not None for weight in found.weights.values()):
        return []
    return [
        "Weights are the numbers that their integers stand for. The graph rounds activations too before it multiplies them, so "
        "what is computed from weights (stack_head_results, say) is near what it computes, and not equal."
    ]


def _left_out(untouched: ir.Model, graph: Unnamed) -> list[str]:
    """Which outputs of the original a hooked file does not have, in a sentence."""
    kept = {graph.result, *graph.match.ports.present.values()}
    others = [str(value.name) for value in untouched.graph.outputs if value.name not in kept]
    if not others:
        return []
    shown = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
    return [f"The original's outputs {shown} are left out: hook points have what a transformer computes on the way."]


def _table_rows(model: ir.Model, found: Match, names: Iterable[str]) -> int | None:
    """How many rows a learned table has; None where none of its names was found."""
    for name in names:
        weight = found.weights.get(name)
        value = None if weight is None else model.graph.initializers.get(weight.tensor)
        if weight is None or value is None or value.shape is None:
            continue
        if weight.cut is not None:
            return weight.cut[2] - weight.cut[1]
        rows = weight.shape[0] if weight.shape is not None else value.shape[0 if weight.permute is None else 1]
        if isinstance(rows, int):
            return rows
    return None


def _ensure_foreign(model: ir.Model, original: Path) -> None:
    """Refuses a file of graphlens's own."""
    from graphlens.file.manifest import METADATA_KEY

    if METADATA_KEY in model.metadata_props:
        raise ModelFileError(f"{original}: this is a hooked file already. Open it: HookedTransformer.from_onnx(...).")


def _original_nodes(hooks: Mapping[str, View], unfused: Unfused) -> dict[str, tuple[str, ...]]:
    """Hook point -> the original's nodes whose result it is."""
    origin = unfused.origin
    return {
        name: tuple(dict.fromkeys(origin.get(node, node) for node in view.nodes))
        for name, view in hooks.items()
        if view.nodes
    }


@dataclass(frozen=True)
class Unnamed:
    """A matched graph that has no hook points yet.

    Attributes:
        model: The graph; it is left as it is.
        match: What was found in it.
        config: The architecture.
        seen: What a probe run saw of its values.
    """

    model: ir.Model
    match: Match
    config: ModelConfig
    seen: Mapping[str, Seen]

    @property
    def result(self) -> str:
        """The name of the original's logits, or of its last hidden states where it has none."""
        found = self.match.ports.logits or self.match.ports.hidden
        assert found is not None, "it was looked for"
        return found

    @property
    def taken(self) -> list[str]:
        """Those of a hooked file's optional inputs that the graph has."""
        from graphlens.file.io_names import ATTENTION_MASK, POSITION_IDS, TOKEN_TYPE_IDS

        ports = self.match.ports
        given = {
            ATTENTION_MASK: ports.attention_mask,
            POSITION_IDS: ports.position_ids,
            TOKEN_TYPE_IDS: ports.token_type_ids,
        }
        return [name for name, port in given.items() if port is not None] + (["past"] if ports.past else [])

    def named(self, hooks: Mapping[str, View]) -> tuple[ir.Model, dict[str, HookEntry]]:
        """A copy of the graph with the inputs, outputs and hook points of a hooked file.

        Args:
            hooks: The hook points that it is to have.

        Returns:
            The copy, and its hook map.

        Raises:
            ModelFileError: A hook point does not fit its value.
        """
        from graphlens.surgery.adopted.counts import make_counts_once
        from graphlens.surgery.adopted.hooks import name_hooks
        from graphlens.surgery.adopted.inputs import free_names, open_ports
        from graphlens.surgery.graph import drop_unused, values_by_name

        model = self.model.clone()
        values = values_by_name(model)
        for node in model.graph:
            for output in node.outputs:
                output.shape = None
        ports = self.match.ports
        free_names(model.graph, all_names(self.config.n_layers))
        open_ports(model, ports, values, self.seen)
        batch = self.seen[ports.input].shape[0]
        try:
            entries = name_hooks(model, values, hooks, self.seen, axis_sizes(self.config), batch, bool(ports.past))
        except ValueError as error:
            raise ModelFileError(f"the match does not fit the graph: {error}") from error
        make_counts_once(model)
        drop_unused(model)
        return model, entries
