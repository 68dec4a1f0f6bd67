"""Checkpoints in TransformerLens's own format: folders with its config, and its weights as safetensors or as a ``.pth`` file.

``NeelNanda/Attn_Only_2L512W_C4_Code`` is one, which TransformerLens calls ``attn-only-2l``. A ``.pth`` file is read by
``torch.load(weights_only=True)`` alone, and once: the folder that is exported then is one in the cache, with safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphlens.analysis.arrays import Array
from graphlens.errors import ExportError, InputError, ModelFileError, RuntimeUnavailable, warn
from graphlens.export.checkpoint import WEIGHTS_FILE, Checkpoint
from graphlens.export.families import transformer_lens as lens
from graphlens.file.copies import Placed
from graphlens.file.digests import digest_of
from graphlens.file.folder import (
    CONFIG_FILE,
    TOKENIZER_FILES,
    cache_root,
    copy_settings,
    staged_folder,
    write_whole,
    writing,
)
from graphlens.file.inside import inside
from graphlens.file.manifest import Json
from graphlens.file.safetensors import SafetensorsFile, TensorEntry, as_float, write_safetensors
from graphlens.file.settings import read_settings
from graphlens.pipelines import from_config
from graphlens.pipelines.adapters import installed
from graphlens.pipelines.lens_reference import lens_logits
from graphlens.pipelines.placing import PlacedWeights

if TYPE_CHECKING:
    from graphlens.pipelines.hub import Source

PTH_ENDING = "final.pth"  # of the file that TransformerLens reads
REVISION = 1


def pth_of(folder: Path) -> Path | None:
    """The ``.pth`` file of a checkpoint in TransformerLens's own format; None for what is none.

    Args:
        folder: A folder.

    Raises:
        ExportError: It holds several.
    """
    if (folder / WEIGHTS_FILE).exists() or not (folder / CONFIG_FILE).is_file():
        return None
    found = sorted(folder.glob(f"*{PTH_ENDING}"))
    if len(found) > 1:
        raise ExportError(f"{folder}: holds {found[0].name} and {found[1].name}; keep the one that is meant.")
    return found[0] if found and lens.is_old_format(settings_in(folder)) else None


def settings_in(folder: Path) -> dict[str, Json]:
    """What the config.json of a folder holds.

    Raises:
        ExportError: It cannot be read.
    """
    try:
        return read_settings(folder / CONFIG_FILE, f"{folder}: its {CONFIG_FILE}")
    except ModelFileError as error:
        raise ExportError(str(error)) from error


def converted(folder: Path, name: str, tokenizer: Callable[[str], Path | None]) -> Path:
    """A folder with a ``.pth`` file as one with safetensors, in the cache folder; made if it is not there yet.

    Args:
        folder: The folder, of which ``pth_of`` gives a file.
        name: The model's name: the oldest checkpoints tell their format by it.
        tokenizer: Gives the folder of the tokenizer of that name, where the checkpoint has none of its own; None where it
            cannot be had.

    Raises:
        ExportError: The file holds something else than tensors, or not the weights that the config asks for.
        RuntimeUnavailable: torch is not installed.
    """
    pth, raw = pth_of(folder), settings_in(folder)
    assert pth is not None
    settings, layout = lens.settings_of(raw), lens.weights_format(raw, name)
    digest = hashlib.sha256(json.dumps(["pth", REVISION, settings, layout], sort_keys=True).encode())
    for file in (pth.name, *(file for file in TOKENIZER_FILES if (folder / file).is_file())):
        digest.update(f"\0{file}\0{digest_of(inside(folder, file))}".encode())
    label = "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip(".-") or "model"
    target = cache_root() / "converted" / f"{label}-{digest.hexdigest()[:24]}"
    if (target / CONFIG_FILE).is_file():
        return target
    state = _loaded(inside(folder, pth.name))
    try:
        state = _CONVERSIONS[layout](state, settings) if layout in _CONVERSIONS else state
    except (KeyError, ValueError) as error:
        raise ExportError(f"{pth}: does not hold the weights of a {layout!r} checkpoint ({error!r}).") from error
    try:
        arrays = from_config.checked_state(settings, state, str(pth), fill=True)
    except InputError as error:
        raise ExportError(f"{error} The weights and the config belong to different models.") from error
    with staged_folder(target, finished=CONFIG_FILE) as stage, writing(target):
        _write_state(stage / WEIGHTS_FILE, arrays)
        copy_settings(folder, stage)
        _add_tokenizer(stage, settings.get("tokenizer_name"), name, tokenizer)
        (stage / CONFIG_FILE).unlink()
        write_whole(stage / CONFIG_FILE, json.dumps(settings, indent=2).encode())
    return target


def _write_state(path: Path, arrays: Mapping[str, Array]) -> None:
    """Writes float32 arrays as a safetensors file."""
    entries = {name: TensorEntry("F32", array.shape, 0, math.prod(array.shape) * 4) for name, array in arrays.items()}
    write_safetensors(path, entries, arrays.values())


def _add_tokenizer(stage: Path, asked: object, name: str, tokenizer: Callable[[str], Path | None]) -> None:
    """Gives a folder the tokenizer that its config names, unless it has one."""
    if not isinstance(asked, str) or any((stage / file).exists() for file in TOKENIZER_FILES):
        return
    found = tokenizer(asked)
    if found is None:
        warn(
            f"{name}: its tokenizer {asked!r} cannot be had from the hub, so the model takes tokens and no text. Pass "
            "tokenizer=, or put its files beside the checkpoint."
        )
        return
    for file in TOKENIZER_FILES:
        if (found / file).is_file():
            shutil.copyfile(inside(found, file), stage / file)


def _loaded(pth: Path) -> dict[str, Array]:
    """The tensors of a ``.pth`` file, by torch's loader for weights alone."""
    if not installed("torch"):
        raise RuntimeUnavailable(
            f"{pth}: reading a .pth file needs torch, which is not installed: pip install 'graphlens-onnx[export]'."
        )
    from graphlens.export.pth import load_pth

    return load_pth(pth)


def _of_old_solu(state: Mapping[str, Array], settings: Mapping[str, Json]) -> dict[str, Array]:
    """The weights of the first SoLU models ("..._old"), whose norms have other names and whose matrices lie otherwise.

    Up to 6 layers all matrices are [outputs, inputs], and up to 8 the position embeddings are [d_model, n_ctx].
    """
    layers = settings["n_layers"]
    assert isinstance(layers, int)
    found = {}
    for old, array in state.items():
        name = old.replace("norm", "ln")
        name = f"ln_final.{name.removeprefix('ln.')}" if name.startswith("ln.") else name
        turned = layers <= 8 if name == "pos_embed.W_pos" else layers <= 6 and "W_" in name
        found[name] = np.swapaxes(array, -2, -1) if turned else array
    return found


def _of_mingpt(state: Mapping[str, Array], settings: Mapping[str, Json]) -> dict[str, Array]:
    """The weights of a model that minGPT trained (Othello-GPT)."""
    heads, layers = settings["n_heads"], settings["n_layers"]
    assert isinstance(heads, int)
    assert isinstance(layers, int)
    found = {"embed.W_E": state["tok_emb.weight"], "pos_embed.W_pos": state["pos_emb"].squeeze()}
    found |= {"unembed.W_U": state["head.weight"].T}
    norms = {"ln_f": "ln_final"} | {
        f"blocks.{layer}.ln{n}": f"blocks.{layer}.ln{n}" for layer in range(layers) for n in "12"
    }
    for old, new in norms.items():
        found |= {f"{new}.w": state[f"{old}.weight"], f"{new}.b": state[f"{old}.bias"]}
    for layer in range(layers):
        at = f"blocks.{layer}"
        for letter, part in (("Q", "query"), ("K", "key"), ("V", "value")):
            weight, bias = state[f"{at}.attn.{part}.weight"], state[f"{at}.attn.{part}.bias"]
            found[f"{at}.attn.W_{letter}"] = weight.reshape(heads, -1, weight.shape[-1]).transpose(0, 2, 1)
            found[f"{at}.attn.b_{letter}"] = bias.reshape(heads, -1)
        out = state[f"{at}.attn.proj.weight"]
        found[f"{at}.attn.W_O"] = out.T.reshape(heads, -1, len(out))
        found[f"{at}.attn.b_O"] = state[f"{at}.attn.proj.bias"]
        for old, new in (("mlp.0", "in"), ("mlp.2", "out")):
            found[f"{at}.mlp.W_{new}"] = state[f"{at}.{old}.weight"].T
            found[f"{at}.mlp.b_{new}"] = state[f"{at}.{old}.bias"]
    return found


_CONVERSIONS: Mapping[str, Callable[[Mapping[str, Array], Mapping[str, Json]], dict[str, Array]]] = {
    "neel-solu-old": _of_old_solu,
    "mingpt": _of_mingpt,
}


def _state_of(folder: Path, files: Sequence[str]) -> dict[str, Array]:
    """The weights of a folder, by their keys."""
    every = [SafetensorsFile(folder / file) for file in files]
    return {key: as_float(file, key) for file in every for key in file.entries}


def reference_of(folder: Path) -> Callable[[Array], Array]:
    """What gives the logits of tokens [b, p] by a checkpoint with safetensors, in NumPy.

    Args:
        folder: The checkpoint's folder.
    """
    from graphlens.export.checkpoint import read_checkpoint

    settings = settings_in(folder)
    state = from_config.checked_state(
        settings, _state_of(folder, read_checkpoint(folder).files), str(folder), fill=True
    )
    return lambda tokens: lens_logits(settings, state, tokens)


def write_hooked(source: Source, checkpoint: Checkpoint, stage: Path, graph: Path, n_ctx: int | None) -> PlacedWeights:
    """Writes the export of a checkpoint with safetensors into a folder: the graph of its config, bound to its weights.

    Args:
        source: The checkpoint's name and the hub's commit.
        checkpoint: The checkpoint.
        stage: The folder.
        graph: The path of the graph in it.
        n_ctx: See ``export_model``.

    Raises:
        ExportError: The weights are not those that the config asks for, or it asks for something that is not computed.
    """
    settings = settings_in(checkpoint.folder)
    state = _state_of(checkpoint.folder, checkpoint.files)
    try:
        arrays = from_config.checked_state(settings, state, str(checkpoint.folder), fill=True)
    except InputError as error:
        raise ExportError(f"{error} The weights and the config belong to different models.") from error
    folder = from_config.graph_of(settings, source.name)
    from_config.bind_into(settings, arrays, folder, stage, graph, n_ctx, (source.name, source.revision))
    copy_settings(checkpoint.folder, stage)
    path = stage / from_config.WEIGHTS_FILE
    return PlacedWeights({path.name: dict(SafetensorsFile(path).entries)}, Placed(path.stat().st_size, {}))
