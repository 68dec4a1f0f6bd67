"""Gemma Scope's layouts: ``params.npz`` of Gemma 2, and ``params.safetensors`` of Gemma 3, whose folders' names tell the hook."""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path

import numpy as np

from graphlens.errors import ModelFileError
from graphlens.file.inside import inside, open_regular
from graphlens.file.sae_config import SaeConfig
from graphlens.file.sae_layouts import Asked, Layout, StoredSae, Tensors, settings_of, text_in
from graphlens.file.sae_places import layer_in, repository_in, unknown_hook
from graphlens.file.safetensors import Array

_NPZ, _SAFETENSORS, _CONFIG = "params.npz", "params.safetensors", "config.json"
_CONTEXT = 1024  # tokens of the texts that all of these were trained on
# What ends the name of a repository of Gemma 2's -> the hook point in a block that its SAEs read.
_KINDS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z", "transcoders": "ln2.hook_normalized"}
# What a folder's name holds, of Gemma 3's.
_PARTS = {"resid_post": "hook_resid_post", "attn_out": "attn.hook_z", "mlp_out": "hook_mlp_out"}


def _arrays(path: Path) -> dict[str, Array]:
    """The arrays of an npz file, float32, by SAELens's names. No pickle in it is opened."""
    try:
        # NumPy itself leaves a file open that is no archive.
        with open_regular(inside(path.parent, path.name)) as opened, zipfile.ZipFile(opened) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            return {_renamed(name.removesuffix(".npy")): _array(archive, name) for name in names}
    except ModelFileError:
        raise
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise ModelFileError(f"{path}: it cannot be read as arrays ({error!s:.200}). Fetch the file again.") from error


def _array(archive: zipfile.ZipFile, name: str) -> Array:
    """One array of an archive, float32."""
    with archive.open(name) as member:
        return np.asarray(np.lib.format.read_array(member, allow_pickle=False), np.float32)


def _renamed(name: str) -> str:
    return f"W_{name[2:]}" if name.startswith("w_") else name


def _config(
    folder: Path,
    asked: Asked,
    weights: dict[str, Array],
    hook: str,
    model: str | None,
    context: int | None = _CONTEXT,
    transcoder: bool = False,
) -> SaeConfig:
    """The settings of one of Gemma Scope's, by its hook and its arrays."""
    encoder, decoder = weights.get("W_enc"), weights.get("W_dec")
    if encoder is None or decoder is None or encoder.ndim != 2 or decoder.ndim != 2:
        raise ModelFileError(f"{folder}: an encoder W_enc and a decoder W_dec are wanted, two matrices.")
    (d_in, d_sae), d_out = encoder.shape, decoder.shape[1]
    transcoder = transcoder or asked.hook_out is not None
    architecture = "jumprelu"
    if transcoder:
        architecture = "jumprelu_skip_transcoder" if "W_skip" in weights else "jumprelu_transcoder"
    return SaeConfig(
        architecture,
        d_in,
        d_sae,
        hook,
        hook_out=(asked.hook_out or hook.replace("ln2.hook_normalized", "hook_mlp_out")) if transcoder else None,
        d_out=d_out if d_out != d_in else None,
        apply_b_dec_to_input=False,
        reshape_activations="hook_z" if hook.endswith("hook_z") else "none",
        model_name=asked.model_name or model,
        context_size=context,
        prepend_bos=True,
    )


def _read_npz(folder: Path, asked: Asked) -> StoredSae:
    weights = _arrays(folder / _NPZ)
    place, layer = repository_in(folder), layer_in(folder)
    named = re.search(r"gemma-scope-(?P<size>\d+b)-(?P<tuned>pt|it)-(?P<kind>\w+)", place)
    embedding = layer is None and "embedding" in folder.absolute().parts
    hook = asked.hook
    if hook is None and embedding:
        hook = "hook_embed"
    elif hook is None and named and named["kind"] in _KINDS and layer is not None:
        hook = f"blocks.{layer}.{_KINDS[named['kind']]}"
    if hook is None:
        raise unknown_hook(folder, "a path like gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71")
    model = f"gemma-2-{named['size']}{'-it' if named['tuned'] == 'it' else ''}" if named else None
    transcoder = named is not None and named["kind"] == "transcoders"
    cfg = _config(folder, asked, weights, hook, model, None if embedding else _CONTEXT, transcoder)
    if embedding:  # trained on what Gemma multiplies its embeddings by
        scale = np.float32(cfg.d_in**0.5)
        weights = {**weights, "W_enc": weights["W_enc"] / scale, "W_dec": weights["W_dec"] * scale}
    return StoredSae(cfg, {name: array for name, array in weights.items() if name in cfg.shapes})


def _read_safetensors(folder: Path, asked: Asked) -> StoredSae:
    said = settings_of(folder / _CONFIG)
    if said.get("architecture") != "jump_relu":
        raise ModelFileError(
            f"{folder / _CONFIG}: architecture {said.get('architecture')!r:.60}, and jump_relu is wanted."
        )
    part = next((hook for name, hook in _PARTS.items() if name in repository_in(folder)), None)
    layer = layer_in(folder)
    if asked.hook is None and (part is None or layer is None):
        raise unknown_hook(folder, "a path like resid_post/layer_12_width_16k_l0_medium")
    tensors = Tensors(folder / _SAFETENSORS)
    for name in ("b_enc", "b_dec", "threshold"):
        tensors.take(name, name)
    tensors.take("W_enc", "w_enc")
    tensors.take("W_dec", "w_dec")
    if "affine_skip_connection" in tensors.names:
        tensors.take("W_skip", "affine_skip_connection")
    model = text_in(said, "model_name")
    return tensors.stored(_config(folder, asked, tensors.weights, asked.hook or f"blocks.{layer}.{part}", model))


LAYOUT = Layout(
    "Gemma Scope",
    (_NPZ,),
    (),
    _read_npz,
    "jumprelu SAEs, of embeddings too, and jumprelu transcoders",
    "the path: `gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`",
)
LATER = Layout(
    "Gemma Scope 2",
    (_CONFIG, _SAFETENSORS),
    (),
    _read_safetensors,
    "jumprelu SAEs; transcoders where `hook=` and `hook_out=` are given",
    "the path: `resid_post/layer_12_width_16k_l0_medium`",
)
