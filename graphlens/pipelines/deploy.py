"""Folders for those who run a model without graphlens: what each runtime that opens one expects to find in it."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graphlens.edits import gate
from graphlens.edits.kinds import Intervention, checked
from graphlens.edits.parts import PARTS
from graphlens.errors import InputError
from graphlens.file.copies import Announce, Placed, ensure_room, place
from graphlens.file.folder import MODEL_FILE, copy_settings, model_path, new_folder, replacing, user_path, writing
from graphlens.file.hook_patterns import match_glob
from graphlens.file.manifest import METADATA_KEY, Manifest
from graphlens.file.names import all_names, axis_sizes, select
from graphlens.file.safetensors import SafetensorsFile, TensorEntry, write_safetensors
from graphlens.file.written import EDITS_KEY, MADE_KEY
from graphlens.file.written import GATES_KEY as GATES_KEY
from graphlens.pipelines.grown import Saes, flags_for, flags_of, grown
from graphlens.pipelines.runtimes import write_genai_config, write_transformersjs
from graphlens.views.progress import note

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphlens.surgery.fold import Folded

LAYOUTS = ("plain", "transformersjs")
EDITED_FILE = "edits.safetensors"  # weights that an edit was folded into


def bake_model(
    model: str | os.PathLike[str],
    interventions: Iterable[Intervention] | Intervention,
    out: str | os.PathLike[str],
    *,
    with_past: bool = False,
    keep_hooks: bool = False,
    self_contained: bool = False,
    layout: str = "plain",
    flags: Sequence[str] = (),
    saes: Saes = (),
    link: bool = False,
    announce: Announce = note,
) -> Path:
    """Writes a folder with a hooked file's model and the interventions inside it.

    Its ``model.onnx`` has standard operators only and runs in any ONNX Runtime, with the outputs ``logits`` (and
    ``present.N.key|value``). What was begun is removed on an error.

    Args:
        model: The hooked file or its folder.
        interventions: In the order in which they apply. Flagged hook points that they name are inserted.
        out: The folder to make: absent, or empty.
        with_past: True adds the inputs and outputs of a KV cache, and what onnxruntime-genai needs beside the graph.
        keep_hooks: True makes a hooked file, which graphlens opens.
        self_contained: What is the default now: the weights are copied. It cannot be combined with ``link``.
        layout: "plain", or "transformersjs" for ``onnx/model.onnx`` with the weights inside (from 2 GB on in
            ``onnx/model.onnx_data``).
        flags: Flags whose hook points are inserted besides.
        saes: SAEs to put into the model: its weights file gets theirs beside it. A ``SplicedSae`` tells of an error term.
        link: True hardlinks the weights, where the file system can, instead of copying them. onnx.load refuses such a
            folder, and so do the tools that use it.
        announce: Called with lines of text for people: what is copied, and how much was written.

    Returns:
        The folder.

    Raises:
        ExportError: If ``out`` is not empty or cannot be written.
        UnknownHookPoint: For a hook point that the model does not have.
        InputError: For an intervention that does not fit, or that a file cannot hold.
        ModelFileError: If the hooked file is damaged.
    """
    from graphlens import surgery

    _check_layout(layout, keep_hooks)
    _check_link(link, self_contained)
    items = checked(interventions)
    source = model_path(model)
    graph = grown(surgery.load(source), {*flags, *flags_of(items)}, saes)
    baked, folded = surgery.bake(graph, items, with_past=with_past, keep_hooks=keep_hooks)
    manifest = surgery.read_manifest(graph)
    return _write(
        baked,
        source.parent,
        out,
        folded=folded,
        link=link,
        announce=announce,
        layout=layout,
        decoder=manifest if with_past else None,
        named=manifest,
    )


def write_drivable(
    model: str | os.PathLike[str],
    gates: Sequence[str] | str,
    out: str | os.PathLike[str],
    *,
    kinds: Sequence[str] = tuple(PARTS),
    required: bool = False,
    with_past: bool = False,
    keep_hooks: bool = False,
    self_contained: bool = False,
    saes: Saes = (),
    link: bool = False,
    announce: Announce = note,
) -> list[str]:
    """Writes a folder with a hooked file's model in which hook points are changed through inputs of the graph.

    The inputs of a hook point's gate are ``<hook>/scale``, ``<hook>/add``, ``<hook>/where`` and ``<hook>/patch`` (see
    docs/drivable.md).

    Args:
        model: The hooked file or its folder.
        gates: The names of the hook points, or shell patterns of them. A pattern that matches no plain hook point may
            match flagged ones, which are then inserted.
        out: The folder to make: absent, or empty.
        kinds: The parts that each gate has: "scale", "add", "patch". A hook point of integers has "patch" alone.
        required: True makes inputs without defaults, which every run must feed. Otherwise their defaults change nothing.
        with_past: As in bake_model.
        keep_hooks: As in bake_model.
        self_contained: As in bake_model.
        saes: As in bake_model. Their hook points may be among the gates.
        link: As in bake_model.
        announce: As in bake_model.

    Returns:
        The names of the hook points that have a gate, in firing order.

    Raises:
        UnknownHookPoint: For a pattern that matches nothing.
        InputError: For a part that there is not, or hook points that one gate cannot reach.
        ExportError: If ``out`` is not empty or cannot be written.
        ModelFileError: If the hooked file is damaged.
    """
    from graphlens import surgery
    from graphlens.surgery.adopted.past import without_past

    _check_link(link, self_contained)
    source = model_path(model)
    graph = surgery.load(source)
    plain = surgery.read_manifest(graph)
    patterns = [gates] if isinstance(gates, str) else list(gates)
    # A pattern that matches plain hook points means those; one that matches none may mean flagged ones.
    missing = [pattern for pattern in patterns if not fnmatch.filter(list(plain.hooks), pattern)]
    possible = all_names(plain.config.n_layers)
    flagged = (name for pattern in missing for name in fnmatch.filter(possible, pattern))
    graph = grown(graph, flags_for(flagged), saes)
    manifest = surgery.read_manifest(graph)
    names = [name for name in manifest.hooks if "@" not in name]
    chosen = {name for pattern in patterns for name in match_glob(names, pattern)}
    graph = surgery.with_past(graph) if with_past else without_past(graph)
    order = [name for name in names if name in chosen]
    fires_again = [name for name in order for other in manifest.hooks if other.startswith(f"{name}@")]
    if fires_again:
        raise InputError(
            f"{fires_again[0]!r} fires for queries, keys and values apart beside split inputs, and one gate would reach the "
            "values alone: write a drivable file for each of the two."
        )
    wanted = {name: (("patch",) if manifest.hooks[name].dtype.startswith("int") else tuple(kinds)) for name in order}
    driven = surgery.with_gates(graph, wanted, required)
    driven.metadata_props[GATES_KEY] = json.dumps(
        {name: {"kinds": wanted[name], "axes": manifest.hooks[name].axes} for name in order}, separators=(",", ":")
    )
    if not keep_hooks:
        driven = _without_hooks(driven)
    _write(
        driven,
        source.parent,
        out,
        link=link,
        announce=announce,
        decoder=manifest if with_past else None,
        named=manifest,
    )
    return order


def write_stripped(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    self_contained: bool = False,
    link: bool = False,
    announce: Announce = note,
) -> Path:
    """Writes a folder with the plain model of a file: hook points are no outputs, and there are no gates.

    Args:
        model: A hooked or a drivable file, or its folder.
        out: The folder to make: absent, or empty.
        self_contained: As in bake_model.
        link: As in bake_model.
        announce: As in bake_model.

    Returns:
        The folder.

    Raises:
        ModelFileError: If the file is damaged.
        ExportError: If ``out`` is not empty or cannot be written.
    """
    from graphlens import surgery

    _check_link(link, self_contained)
    source = model_path(model)
    stripped = surgery.without_gates(surgery.load_plain(source))
    stripped.metadata_props.pop(GATES_KEY, None)
    if METADATA_KEY in stripped.metadata_props:
        stripped = _without_hooks(stripped)
    return _write(stripped, source.parent, out, link=link, announce=announce)


def write_adapter(
    model: str | os.PathLike[str],
    interventions: Iterable[Intervention] | Intervention,
    out: str | os.PathLike[str],
) -> list[str]:
    """Writes interventions as an ``.onnx_adapter`` file: a steering vector, say, in a file of its own.

    An ONNX Runtime that runs the drivable file of the same model takes the file through its run options.

    Args:
        model: The hooked file that the drivable one was made of, or its folder.
        interventions: In the order in which they apply. Each is the same at every position.
        out: The file to write.

    Returns:
        The names of the inputs that the file sets.

    Raises:
        InputError: For an intervention that depends on position or batch.
        UnknownHookPoint: For a hook point that the model does not have.
        ModelFileError: If the hooked file is damaged.
    """
    from graphlens import surgery
    from graphlens.runtime.adapters import write_adapter_file
    from graphlens.surgery.fold import affine

    items = checked(interventions)
    graph = surgery.load(model)
    manifest = surgery.read_manifest(grown(graph, flags_of(items)))
    layers, sizes = manifest.config.n_layers, axis_sizes(manifest.config)
    by_hook: dict[str, list[Intervention]] = {}
    for item in items:
        (name,) = select(list(manifest.hooks), item.hook, layers)
        by_hook.setdefault(name, []).append(item.at(name))
    inputs = {}
    for name, some in by_hook.items():
        entry = manifest.hooks[name]
        gate.check(some, [entry], sizes)
        change = affine(some, entry, manifest)
        if change is None:
            raise InputError(f"{some[0].label}: an adapter file holds changes that are the same at every position.")
        # ONNX Runtime's adapters hold no booleans, so what is replaced is multiplied by 0 first.
        for part, array in zip(("scale", "add"), change, strict=True):
            if (array != gate.neutral(part, entry.dtype)).any():
                inputs[surgery.gate_input(name, part)] = array
    target = user_path(out)
    with writing(target), replacing(target) as made:
        write_adapter_file(inputs, made)
    return list(inputs)


def _check_layout(layout: str, keep_hooks: bool) -> None:
    """Raises InputError for a layout that there is not, or that holds no hooks."""
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout!r}: there is {', '.join(LAYOUTS)}.")
    if layout != "plain" and keep_hooks:
        raise InputError(f"layout {layout!r} is for files without hooks: graphlens opens only the plain layout.")


def _check_link(link: bool, self_contained: bool) -> None:
    """Raises InputError where weights shall be both copied and hardlinked."""
    if link and self_contained:
        raise InputError(
            "self_contained copies the weights, as is the default now, and link hardlinks them: choose one."
        )


def _without_hooks(model: ir.Model) -> ir.Model:
    """A copy of a hooked graph that returns the results alone and has no manifest."""
    from graphlens import surgery

    plain = surgery.keep_results(model)
    del plain.metadata_props[METADATA_KEY]
    return plain


def _write(
    model: ir.Model,
    source: Path,
    out: str | os.PathLike[str],
    *,
    link: bool,
    announce: Announce,
    folded: Folded | None = None,
    layout: str = "plain",
    decoder: Manifest | None = None,
    named: Manifest | None = None,
) -> Path:
    """Writes the folder ``out``, whole: graph, weights, settings, and what the runtimes want beside them.

    Args:
        model: The graph. Its weights lie in the folder ``source``.
        source: The folder of the hooked file.
        out: The folder to make.
        link: True hardlinks the weights instead of copying them.
        announce: Called with lines of text about what is copied and how much was written.
        folded: The new content of weights that edits went into.
        layout: One of LAYOUTS.
        decoder: The manifest, for onnxruntime-genai, of a graph with a KV cache.
        named: The manifest of the hooked file, by which nodes are labelled for viewers.

    Returns:
        ``out``.
    """
    if METADATA_KEY not in model.metadata_props and not {EDITS_KEY, GATES_KEY} & model.metadata_props.keys():
        model.metadata_props[MADE_KEY] = "plain"
    from graphlens.surgery.held_weights import beside

    with new_folder(out) as stage:
        copy_settings(source, stage)
        if folded:
            _write_folded(model, folded, source, stage)
        model, brought = beside(model, stage)
        placed = Placed(0, {})
        if layout == "transformersjs":
            write_transformersjs(model, stage)
            for file in (stage / EDITED_FILE, *brought):  # their tensors are in the graph now
                file.unlink(missing_ok=True)
        else:
            if decoder is not None:
                write_genai_config(decoder, stage)
            placed = _write_plain(model, stage, link, announce, named)
        written = placed.line(stage)
    announce(written)
    short = None if decoder is None else decoder.config.rotary_short
    if short is not None:
        announce(
            f"The keys that a KV cache holds are rotated for inputs of up to {short} tokens. Beyond them this model rotates all "
            "keys by other frequencies (longrope): run all tokens again there, with an empty cache."
        )
    return user_path(out)


def _write_plain(model: ir.Model, stage: Path, link: bool, announce: Announce, named: Manifest | None) -> Placed:
    """Writes the graph and puts its weights files beside it. Its manifest, if it has one, is made to describe these files."""
    from graphlens.surgery.files import weights_files, write_graph
    from graphlens.surgery.fingerprint import fingerprint
    from graphlens.surgery.graph import read_manifest, write_manifest

    files = dict(sorted(weights_files(model).items()))
    placed = place({name: path for name, path in files.items() if not (stage / name).exists()}, stage, link, announce)
    if METADATA_KEY in model.metadata_props:
        known = read_manifest(model)
        found = {name: known.files[name] if name in known.files else fingerprint(stage / name) for name in files}
        write_manifest(model, known.with_files(found))
    write_graph(model, stage / MODEL_FILE, named=named)
    return placed


def _write_folded(model: ir.Model, folded: Folded, source: Path, stage: Path) -> None:
    """Writes the changed weights to a file of their own and points the graph at it, in place."""
    from graphlens.file.stored import bind, in_files, place_of

    keys: dict[tuple[str, int], str] = {}
    entries: dict[str, TensorEntry] = {}
    for (file, tensor), array in folded.items():
        key = f"{file}:{tensor}" if tensor in entries else tensor
        keys[file, SafetensorsFile(source / file).entries[tensor].offset] = key
        entries[key] = TensorEntry("F32", array.shape, 0, array.nbytes)
    ensure_room(stage, sum(entry.length for entry in entries.values()))
    path = stage / EDITED_FILE
    write_safetensors(path, entries, folded.values())
    written = SafetensorsFile(path).entries
    for value, old in in_files(model):
        if place_of(old) in keys:
            bind(value, path, written[keys[place_of(old)]])
