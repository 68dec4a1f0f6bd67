"""dictionary_learning's layout: ``config.json`` with its trainer, and the dictionary's weights as ``ae.safetensors``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphlens.errors import ModelFileError
from graphlens.file.processing import UNPROCESSED
from graphlens.file.sae_config import WEIGHTS, SaeConfig
from graphlens.file.sae_layouts import Asked, Layout, StoredSae, Tensors, settings_of, text_in, whole_in
from graphlens.file.sae_places import unknown_hook

if TYPE_CHECKING:
    from graphlens.file.manifest import Json

_CONFIG, _FILE = "config.json", "ae.safetensors"
# Class of dictionary -> architecture, and whether b_dec is taken from the input.
_CLASSES = {
    "AutoEncoder": ("standard", True),
    "AutoEncoderNew": ("standard", False),
    "GatedAutoEncoder": ("gated", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("jumprelu", True),  # what it runs as once it is trained
    "MatryoshkaBatchTopKSAE": ("jumprelu", True),
}
# Weight -> what it is called, and whether with its axes the other way around.
_NAMES: dict[str, tuple[tuple[str, bool], ...]] = {
    "W_enc": (("W_enc", False), ("encoder.weight", True)),
    "W_dec": (("W_dec", False), ("decoder.weight", True)),
    "b_enc": (("b_enc", False), ("encoder.bias", False)),
    "b_dec": (("b_dec", False), ("bias", False), ("decoder_bias", False), ("decoder.bias", False)),
    "b_gate": (("gate_bias", False),),
    "b_mag": (("mag_bias", False),),
    "r_mag": (("r_mag", False),),
    "threshold": (("threshold", False),),
}
# How a submodule's name begins -> the hook point in a block that it is.
_PLACES = {
    "resid_post": "hook_resid_post",
    "resid_pre": "hook_resid_pre",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
    "attention_out": "hook_attn_out",
}


def _hook(trainer: dict[str, Json]) -> str | None:
    """The hook point of a trainer's layer; the residual stream behind it where nothing says otherwise, as SAELens takes it."""
    layer, place = whole_in(trainer, "layer"), text_in(trainer, "submodule_name")
    if layer is None:
        return None
    if place is None:
        return f"blocks.{layer}.hook_resid_post"
    found = next((hook for begin, hook in _PLACES.items() if place.startswith(begin)), None)
    return None if found is None else f"blocks.{layer}.{found}"


def _read(folder: Path, asked: Asked) -> StoredSae:
    said = settings_of(folder / _CONFIG)
    trainer, buffer = said.get("trainer"), said.get("buffer")
    if not isinstance(trainer, dict) or trainer.get("dict_class") not in _CLASSES:
        named = trainer.get("dict_class") if isinstance(trainer, dict) else None
        raise ModelFileError(
            f"{folder / _CONFIG}: a dictionary of class {named!r:.60} cannot be run. Those that can: {', '.join(_CLASSES)}."
        )
    architecture, takes = _CLASSES[str(trainer["dict_class"])]
    hook = asked.hook or _hook(trainer)
    if hook is None:
        raise unknown_hook(folder, f"{_CONFIG} by its layer and its submodule_name")
    tensors = Tensors(folder / _FILE)
    for weight in ("W_enc", "W_dec", "b_dec", *WEIGHTS[architecture]):
        for name, transposed in _NAMES[weight]:
            if name in tensors.names:
                tensors.take(weight, name, transposed)
                break
    encoder = tensors.weights.get("W_enc")
    if encoder is None or encoder.ndim != 2:
        raise ModelFileError(f"{folder / _FILE}: it holds no encoder, a matrix W_enc or encoder.weight.")
    d_in, d_sae = encoder.shape
    if "threshold" in tensors.weights and tensors.weights["threshold"].ndim == 0:
        tensors.put("threshold", np.full(d_sae, tensors.weights["threshold"]))
    return tensors.stored(
        SaeConfig(
            architecture,
            d_in,
            d_sae,
            hook,
            hook_out=asked.hook_out,  # refused: none of these is a transcoder
            k=whole_in(trainer, "k") if architecture == "topk" else None,
            apply_b_dec_to_input=takes,
            model_name=asked.model_name or (text_in(trainer, "lm_name") or "").split("/")[-1] or None,
            context_size=whole_in(buffer, "ctx_len") if isinstance(buffer, dict) else None,
            metadata={**UNPROCESSED, "dict_class": trainer["dict_class"]},
        )
    )


LAYOUT = Layout(
    "dictionary_learning",
    (_CONFIG, _FILE),
    (),
    _read,
    ", ".join(f"`{name}`" for name in _CLASSES),
    "`config.json`: its layer and its submodule",
)
