"""EleutherAI sparsify's layout: ``cfg.json`` and ``sae.safetensors`` in a folder that is named after the module that it reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphlens.errors import ModelFileError
from graphlens.file.processing import UNPROCESSED
from graphlens.file.sae_config import SaeConfig
from graphlens.file.sae_layouts import Asked, Layout, StoredSae, Tensors, settings_of, text_in, whole_in
from graphlens.file.sae_names import OF_MODULE
from graphlens.file.sae_places import layer_in, unknown_hook
from graphlens.file.settings import read_settings

if TYPE_CHECKING:
    from graphlens.file.manifest import Json

_CONFIG, _FILE, _ABOVE = "cfg.json", "sae.safetensors", "config.json"
_EXPANSION, _K = 32, 32  # sparsify's defaults


def _hook(folder: Path, transcoder: bool) -> tuple[str, str | None] | None:
    """The hook points that a folder's name tells: what is read, and what a transcoder stands for."""
    name = folder.absolute().name
    if name == "embed_tokens":
        return "hook_embed", None
    layer = layer_in(Path(name), r"layers?[._](\d+)")
    if layer is None:
        layer = layer_in(Path(name), r"h\.(\d+)")  # GPT-2's
    if layer is None:
        return None
    if name.endswith("mlp"):
        # A transcoder reads what the module does: the normed stream times the norm's weights, which hook_normalized lacks.
        return (f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out") if transcoder else (
            f"blocks.{layer}.hook_mlp_out",
            None,
        )  # fmt: skip
    if name.endswith(("attn", "attention")):
        return None if transcoder else (f"blocks.{layer}.hook_attn_out", None)
    return None if transcoder else (f"blocks.{layer}.hook_resid_post", None)


def _read(folder: Path, asked: Asked) -> StoredSae:
    said = settings_of(folder / _CONFIG)
    how = said.get("activation", "topk")
    if how != "topk" or said.get("signed") is True:
        shown = "signed topk" if how == "topk" else str(how)
        raise ModelFileError(f"{folder / _CONFIG}: activation {shown!r:.60} cannot be run. There is: topk.")
    transcoder = said.get("transcode") is True
    hooks = (asked.hook, asked.hook_out) if asked.hook else _hook(folder, transcoder)
    if hooks is None:
        raise unknown_hook(folder, "the folder's name, like layers.3 or layers.3.mlp")
    tensors = Tensors(folder / _FILE)
    _weights(tensors, said)
    skip = transcoder and "W_skip" in tensors.names
    if skip:
        tensors.take("W_skip", "W_skip")
    elif "W_skip" in tensors.names:
        raise ModelFileError(
            f"{folder}: an SAE with a W_skip is none: it adds its own input. Only transcoders have one."
        )
    d_sae, d_in = tensors.weights["W_enc"].shape[1], tensors.weights["W_enc"].shape[0]
    above = read_settings(folder.parent / _ABOVE)
    cfg = SaeConfig(
        ("skip_transcoder" if skip else "transcoder") if transcoder else "topk",
        d_in,
        d_sae,
        hooks[0],
        hook_out=asked.hook_out or hooks[1],
        k=whole_in(said, "k") or _K,
        apply_b_dec_to_input=not transcoder,
        model_name=asked.model_name or text_in(above, "model"),
        context_size=whole_in(above, "ctx_len"),
        metadata={
            **UNPROCESSED,
            # What sparsify trains on is what the module gives: where a norm comes next, hook_mlp_out is behind it.
            **({} if asked.hook else {OF_MODULE: True}),
            **{name: value for name, value in said.items() if name not in ("d_in", "k", "num_latents")},
        },
    )
    return tensors.stored(cfg)


def _weights(tensors: Tensors, said: dict[str, Json]) -> None:
    """The encoder and the decoder, of files old and new. Absent biases are 0."""
    tensors.take(
        "W_enc", tensors.first("W_enc", "encoder.weight") or "encoder.weight", transposed="W_enc" not in tensors.names
    )
    width = tensors.weights["W_enc"].shape
    if len(width) != 2:
        raise ModelFileError(f"{_FILE}: encoder.weight is no matrix.")
    d_in, d_sae = width
    if "W_dec" in tensors.names:
        # [features, width] as sparsify writes it; the other way around only where nothing else fits.
        tensors.take("W_dec", "W_dec", transposed=tensors.array("W_dec").shape[:1] != (d_sae,))
    else:
        tensors.take("W_dec", "decoder.weight", transposed=True)
    for name, old, size in (("b_enc", "encoder.bias", d_sae), ("b_dec", "decoder.bias", d_in)):
        found = tensors.first(name, old)
        if found is None:
            tensors.put(name, np.zeros(size, np.float32))
        else:
            tensors.take(name, found)
    told = whole_in(said, "num_latents") or d_in * (whole_in(said, "expansion_factor") or _EXPANSION)
    if told != d_sae or whole_in(said, "d_in") not in (None, d_in):
        raise ModelFileError(
            f"{_CONFIG} tells of {said.get('d_in')} x {told}, and the encoder in {_FILE} is {d_in} x {d_sae}. One of the two "
            "is another SAE's."
        )


LAYOUT = Layout(
    "sparsify",
    (_CONFIG, _FILE),
    (f"../{_ABOVE}",),
    _read,
    "topk SAEs, transcoders, skip transcoders",
    "the folder's name: `layers.3`, `layers.3.mlp`, `h.3.mlp`, `embed_tokens`",
)
