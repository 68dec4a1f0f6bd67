"""Folders for those who run a model without graphlens: what each runtime that opens one expects to find in it."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphlens.edits.kinds import Intervention, checked
from graphlens.errors import ExportError, InputError
from graphlens.file.folder import copy_settings
from graphlens.file.manifest import METADATA_KEY, Manifest
from graphlens.file.names import FLAGGED, all_names, axis_sizes, canonical, match_glob, select, split_name
from graphlens.file.safetensors import TensorEntry, write_safetensors

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphlens.surgery.fold import Folded

LAYOUTS = ("plain", "transformersjs")
EDITED_FILE = "edits.safetensors"  # weights that an edit was folded into
GATES_KEY = "graphlens.gates"
_EMBEDDABLE = 2_000_000_000  # bytes: a protobuf holds no more than 2 GiB


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
) -> Path:
    """Writes the folder ``out``: the hooked file ``model`` with the interventions inside; returns it.

    ``out/model.onnx`` has standard operators only and runs in any ONNX Runtime, with the outputs ``logits`` (and
    ``present.N.key|value``). ``with_past``: with the inputs and outputs of a KV cache, and what onnxruntime-genai needs
    beside it. ``keep_hooks``: a hooked file, which graphlens opens. ``self_contained`` copies the weights where they
    would be hardlinked. ``layout="transformersjs"`` writes ``onnx/model.onnx`` with the weights inside (from 2 GB on in
    ``onnx/model.onnx_data``). Flagged hook points that an intervention names are inserted; ``flags`` inserts more.
    Raises ExportError for an ``out`` that is not empty or cannot be written, UnknownHookPoint, InputError,
    ModelFileError. What was begun is removed on an error.
    """
    from graphlens import surgery
    from graphlens.file.folder import model_path

    _check_layout(layout, keep_hooks)
    items = checked(interventions)
    source = model_path(model)
    graph = surgery.with_flagged(surgery.load(source), _flags_of(items, flags))
    baked, folded = surgery.bake(graph, items, with_past=with_past, keep_hooks=keep_hooks)
    manifest = surgery.read_manifest(graph)
    with _new_folder(out) as stage:
        _write(baked, source.parent, stage, manifest, folded, self_contained, layout, with_past)
    return Path(out).expanduser()


def write_drivable(
    model: str | os.PathLike[str],
    gates: Sequence[str] | str,
    out: str | os.PathLike[str],
    *,
    kinds: Sequence[str] = ("scale", "add", "patch"),
    required: bool = False,
    with_past: bool = False,
    keep_hooks: bool = False,
    self_contained: bool = False,
) -> list[str]:
    """Writes the folder ``out``: the hooked file ``model`` with a gate at each hook point that ``gates`` (names or shell
    patterns) picks; returns their names.

    A gate's inputs are ``<hook>/scale``, ``<hook>/add``, ``<hook>/where`` and ``<hook>/patch`` (see docs/drivable.md);
    ``kinds`` leaves some out. They have defaults that change nothing unless ``required``. Other arguments are as in
    bake_model. Raises UnknownHookPoint for a pattern that matches nothing, and what bake_model raises.
    """
    from graphlens import surgery
    from graphlens.file.folder import model_path

    source = model_path(model)
    graph = surgery.load(source)
    patterns = [gates] if isinstance(gates, str) else list(gates)
    layers = surgery.read_manifest(graph).config.n_layers
    plain, possible = list(surgery.read_manifest(graph).hooks), all_names(layers)
    # A pattern that matches plain hook points means those; one that matches none may mean flagged ones.
    missing = [pattern for pattern in patterns if not fnmatch.filter(plain, pattern)]
    flagged = {split_name(name)[1] for pattern in missing for name in fnmatch.filter(possible, pattern)}
    graph = surgery.with_flagged(graph, {FLAGGED[rest] for rest in flagged if rest in FLAGGED})
    manifest = surgery.read_manifest(graph)
    names = [name for name in manifest.hooks if "@" not in name]
    chosen = {name for pattern in patterns for name in match_glob(names, pattern)}
    if with_past:
        graph = surgery.with_past(graph)
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
        driven = surgery.keep_results(driven)
        del driven.metadata_props[METADATA_KEY]
    with _new_folder(out) as stage:
        _write(driven, source.parent, stage, manifest, {}, self_contained, "plain", with_past)
    return order


def write_stripped(model: str | os.PathLike[str], out: str | os.PathLike[str], *, self_contained: bool = False) -> Path:
    """Writes the folder ``out``: the model without its hook points being outputs, and without gates; returns it.

    ``model`` is a hooked or a drivable file. Raises ModelFileError and ExportError.
    """
    from graphlens import surgery
    from graphlens.file.folder import model_path

    source = model_path(model)
    stripped = surgery.without_gates(surgery.load_plain(source))
    stripped.metadata_props.pop(GATES_KEY, None)
    if METADATA_KEY in stripped.metadata_props:
        stripped = surgery.keep_results(stripped)
        del stripped.metadata_props[METADATA_KEY]
    with _new_folder(out) as stage:
        _write(stripped, source.parent, stage, None, {}, self_contained, "plain", False)
    return Path(out).expanduser()


def write_adapter(
    model: str | os.PathLike[str],
    interventions: Iterable[Intervention] | Intervention,
    out: str | os.PathLike[str],
) -> list[str]:
    """Writes interventions that are the same at every position as an ``.onnx_adapter`` file for the drivable file of
    ``model`` (a hooked file); returns the names of the inputs it sets.

    An ONNX Runtime that runs the drivable file takes it through its run options: a steering vector in a file of its own.
    Raises InputError for an intervention that depends on position or batch, UnknownHookPoint, ModelFileError.
    """
    from graphlens import surgery
    from graphlens.edits import gate
    from graphlens.runtime.adapters import write_adapter_file
    from graphlens.surgery.fold import affine

    items = checked(interventions)
    graph = surgery.load(model)
    manifest = surgery.read_manifest(surgery.with_flagged(graph, _flags_of(items, ())))
    layers, sizes = manifest.config.n_layers, axis_sizes(manifest.config)
    by_hook: dict[str, list[Intervention]] = {}
    for item in items:
        (name,) = select(list(manifest.hooks), item.hook, layers)
        by_hook.setdefault(name, []).append(item.at(name))
    inputs = {}
    for name, some in by_hook.items():
        entry = manifest.hooks[name]
        gate.check(some, entry, sizes)
        change = affine(some, entry, manifest)
        if change is None:
            raise InputError(f"{some[0].label}: an adapter file holds changes that are the same at every position.")
        # ONNX Runtime's adapters hold no booleans, so what is replaced is multiplied by 0 first.
        for part, array in zip(("scale", "add"), change, strict=True):
            if (array != gate.neutral(part, entry.dtype)).any():
                inputs[surgery.gate_input(name, part)] = array.reshape(
                    (1,) * (len(entry.axes) - array.ndim) + array.shape
                )
    write_adapter_file(inputs, out)
    return list(inputs)


def _check_layout(layout: str, keep_hooks: bool) -> None:
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout!r}: there is {', '.join(LAYOUTS)}.")
    if layout != "plain" and keep_hooks:
        raise InputError(f"layout {layout!r} is for files without hooks: graphlens opens only the plain layout.")


def _flags_of(items: Sequence[Intervention], flags: Sequence[str]) -> set[str]:
    """The flags whose hook points the interventions name, and those asked for."""
    named = (split_name(canonical(item.hook))[1] for item in items)
    return {*flags, *(FLAGGED[rest] for rest in named if rest in FLAGGED)}


@contextlib.contextmanager
def _new_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder that becomes ``out`` at the end, whole, or vanishes on an error."""
    from graphlens.file.folder import staged_folder, writing

    target = Path(out).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target}: exists and is not empty. Choose another folder.")
    with staged_folder(target) as stage, writing(target):
        yield stage


def _write(
    model: ir.Model,
    source: Path,
    stage: Path,
    manifest: Manifest | None,
    folded: Folded,
    self_contained: bool,
    layout: str,
    with_past: bool,
) -> None:
    """Writes graph, weights, settings and what the runtimes want beside them."""
    from graphlens.file.folder import link_or_copy
    from graphlens.surgery.files import weights_files, write_graph

    copy_settings(source, stage)
    if folded:
        _write_folded(model, folded, source, stage)
    if manifest is not None and with_past:
        _write_genai_config(manifest, stage)
    if layout == "transformersjs":
        _write_transformersjs(model, stage)
        return
    for name, path in sorted(weights_files(model).items()):
        place = stage / name
        if place.exists():
            continue
        if self_contained:
            shutil.copyfile(path.resolve(strict=True), place)
        else:
            link_or_copy(path, place)
    _refresh_fingerprints(model, stage)
    write_graph(model, stage / "model.onnx")


def _refresh_fingerprints(model: ir.Model, stage: Path) -> None:
    """Lets a hooked file's manifest describe the weights files that lie beside it."""
    from graphlens.surgery.files import weights_files
    from graphlens.surgery.fingerprint import fingerprint
    from graphlens.surgery.graph import read_manifest, write_manifest

    if METADATA_KEY in model.metadata_props:
        files = sorted(weights_files(model))
        known = read_manifest(model)
        found = {name: known.files[name] if name in known.files else fingerprint(stage / name) for name in files}
        write_manifest(model, known.with_files(found))


def _write_folded(model: ir.Model, folded: Folded, source: Path, stage: Path) -> None:
    """Writes the changed weights to a file of their own and points the graph at it, in place."""
    import onnx_ir as ir

    from graphlens.file.safetensors import SafetensorsFile

    offsets = {}
    entries = {}
    for (file, tensor), array in folded.items():
        entry = SafetensorsFile(source / file).entries[tensor]
        offsets[file, entry.offset] = f"{file}:{tensor}" if f"{tensor}" in entries else tensor
        entries[offsets[file, entry.offset]] = TensorEntry("F32", array.shape, 0, array.nbytes)
    path = stage / EDITED_FILE
    write_safetensors(path, entries, folded.values())
    written = SafetensorsFile(path).entries
    for value in model.graph.initializers.values():
        tensor_value = value.const_value
        if not isinstance(tensor_value, ir.ExternalTensor):
            continue
        name = offsets.get((str(tensor_value.location), int(tensor_value.offset or 0)))
        if name is not None:
            value.const_value = ir.ExternalTensor(
                EDITED_FILE,
                written[name].offset,
                written[name].length,
                ir.DataType.FLOAT,
                shape=ir.Shape(written[name].shape),
                name=str(value.name),
                base_dir=str(stage),
            )


def _settings(stage: Path, name: str) -> dict[str, Any]:
    path = stage / name
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _write_genai_config(manifest: Manifest, stage: Path) -> None:
    """onnxruntime-genai's description of a decoder with split past and present."""
    config, hf = manifest.config, {**_settings(stage, "config.json"), **_settings(stage, "generation_config.json")}
    eos = hf.get("eos_token_id")
    first_eos = eos[0] if isinstance(eos, list) else eos
    tokens = {"bos_token_id": hf.get("bos_token_id", first_eos), "eos_token_id": eos}
    pad = hf.get("pad_token_id")
    tokens["pad_token_id"] = first_eos if pad is None else pad
    cache = {"past": "past_key_values.%d.{}", "present": "present.%d.{}"}
    data = {
        "model": {
            **{name: token for name, token in tokens.items() if token is not None},
            "context_length": config.n_ctx,
            "vocab_size": config.d_vocab,
            "type": "decoder",
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": config.d_head,
                "hidden_size": config.d_model,
                "num_attention_heads": config.n_heads,
                "num_key_value_heads": config.n_key_value_heads,
                "num_hidden_layers": config.n_layers,
                "inputs": {
                    **{name: name for name in ("input_ids", "attention_mask", "position_ids")},
                    **{f"past_{part}_names": cache["past"].format(part) for part in ("key", "value")},
                },
                "outputs": {
                    "logits": "logits",
                    **{f"present_{part}_names": cache["present"].format(part) for part in ("key", "value")},
                },
            },
        },
        "search": {"do_sample": False, "max_length": config.n_ctx, "past_present_share_buffer": False},
    }
    _write_json(stage / "genai_config.json", data)


def _write_transformersjs(model: ir.Model, stage: Path) -> None:
    """``onnx/model.onnx`` as transformers.js looks for it, and what it reads in config.json."""
    import onnx_ir as ir

    from graphlens.surgery.files import mapped

    folder = stage / "onnx"
    folder.mkdir()
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = mapped(value.const_value)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    embed = size < _EMBEDDABLE
    ir.save(model, folder / "model.onnx", external_data=None if embed else "model.onnx_data")
    settings = _settings(stage, "config.json")
    settings["transformers.js_config"] = {"dtype": "fp32", **({} if embed else {"use_external_data_format": True})}
    _write_json(stage / "config.json", settings)
    for file in (stage / EDITED_FILE, stage / "genai_config.json"):
        file.unlink(missing_ok=True)
