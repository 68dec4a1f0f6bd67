"""SAELens's layout of an SAE: ``cfg.json`` as its versions have written it, and ``sae_weights.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphlens.errors import InputError
from graphlens.file.sae_config import WEIGHTS, SaeConfig
from graphlens.file.sae_layouts import Asked, Layout, StoredSae, Tensors, settings_of, text_in, whole_in
from graphlens.file.safetensors import Array, TensorEntry, write_safetensors

if TYPE_CHECKING:
    from graphlens.file.manifest import Json

CONFIG, FILE = "cfg.json", "sae_weights.safetensors"
# The version of SAELens whose settings ``write`` writes: older ones mean other things by their defaults.
_VERSION = "6.0.0"
_KEEPING = "topk_"  # before the name of a transcoder with k, which SAELens has not: it refuses the file
_BATCHED = ("batchtopk", "matryoshka_batchtopk")
_REFUSED = ("temporal", "matching_pursuit", "abstopk")
_SMALLEST = 1e-8  # of a row's norm, when norms are folded
_OWN = {
    "architecture", "d_in", "d_sae", "d_out", "k", "dtype", "device", "apply_b_dec_to_input", "normalize_activations",
    "reshape_activations", "rescale_acts_by_decoder_norm", "metadata", "activation_fn", "activation_fn_str",
    "activation_fn_kwargs", "hook_name", "hook_point", "hook_name_out", "model_name", "context_size", "prepend_bos",
    "finetuning_scaling_factor",
}  # fmt: skip


def config_of(said: Mapping[str, Json], asked: Asked) -> tuple[SaeConfig, str]:
    """The settings that a ``cfg.json`` means.

    Args:
        said: What it holds.
        asked: What the user says of the SAE.

    Returns:
        The settings, and the architecture that the file names.

    Raises:
        InputError: It names an architecture, an activation function or a normalisation that is not known, or no hook point.
    """
    metadata = said.get("metadata")
    about: dict[str, Json] = {**said, **(metadata if isinstance(metadata, dict) else {})}
    new = _is_new(about.get("sae_lens_version"))
    named = str(said.get("architecture", "standard"))
    k, architecture = whole_in(said, "k"), named
    normalisation = said.get("normalize_activations")
    if about.get("hook_head_index") is not None:
        raise InputError(
            f"{CONFIG}: an SAE of one head alone (hook_head_index={about['hook_head_index']!r:.20}) cannot be run: it would be "
            "of every head here."
        )
    hook = asked.hook or text_in(about, "hook_name", "hook_point")
    reshape = said.get("reshape_activations")
    if not new:
        kind = said.get("activation_fn_str", said.get("activation_fn", "relu"))
        given = said.get("activation_fn_kwargs")
        if kind == "topk":
            k = whole_in(given, "k") if isinstance(given, dict) else k
            architecture = named = "topk"
        elif kind not in ("relu", None):
            raise InputError(f"{CONFIG}: activation function {kind!r:.60} is not known. There are: relu, topk.")
        if isinstance(normalisation, bool):
            normalisation = "expected_average_only_in" if normalisation else "none"
        if reshape is None and "hook_z" in (hook or ""):
            reshape = "hook_z"
    if architecture in _BATCHED:
        architecture, k = "jumprelu", None
    elif architecture.removeprefix(_KEEPING) in WEIGHTS and architecture.endswith("transcoder"):
        architecture = architecture.removeprefix(_KEEPING)
    elif architecture in _REFUSED or architecture not in WEIGHTS:
        known = ", ".join((*WEIGHTS, *_BATCHED))
        raise InputError(f"{CONFIG}: architecture {architecture!r:.60} cannot be run. Those that can: {known}.")
    transcoder, topk = architecture.endswith("transcoder"), architecture == "topk"
    takes = said.get("apply_b_dec_to_input", not transcoder)
    if not isinstance(takes, bool):
        raise InputError(f"{CONFIG}: apply_b_dec_to_input={takes!r:.40}: true or false is wanted.")
    d_in, d_out = whole_in(said, "d_in"), whole_in(said, "d_out")
    rest = {name: value for name, value in about.items() if name not in _OWN}
    return (
        SaeConfig(
            architecture,
            _size(d_in, "d_in"),
            _size(whole_in(said, "d_sae"), "d_sae"),
            hook or "",
            hook_out=asked.hook_out or (text_in(about, "hook_name_out") if transcoder else None),
            d_out=d_out if transcoder and d_out != d_in else None,
            k=k if topk or named.startswith(_KEEPING) else None,
            apply_b_dec_to_input=takes,
            normalize_activations="none" if normalisation is None else str(normalisation),
            reshape_activations="none" if reshape is None else str(reshape),
            rescale_acts_by_decoder_norm=topk and said.get("rescale_acts_by_decoder_norm") is True,
            model_name=asked.model_name or text_in(about, "model_name"),
            context_size=whole_in(about, "context_size"),
            prepend_bos=_flag(about.get("prepend_bos")),
            metadata=rest,
        ),
        named,
    )


def _is_new(version: Json) -> bool:
    """True for the version of a SAELens that writes the settings of today: 6 and later."""
    first = version.partition(".")[0] if isinstance(version, str) else ""
    return first.isdecimal() and int(first) >= int(_VERSION[0])


def _size(size: int | None, name: str) -> int:
    if size is None:
        raise InputError(f"{CONFIG}: it does not say {name}. Put the original file back.")
    return size


def _flag(value: Json) -> bool | None:
    return value if isinstance(value, bool) else None


def _read(folder: Path, asked: Asked) -> StoredSae:
    said = settings_of(folder / CONFIG)
    cfg, named = config_of(said, asked)
    tensors = Tensors(folder / FILE)
    for name in cfg.shapes:
        if name == "threshold" and name not in tensors.names:
            _threshold(tensors, cfg)
        else:
            tensors.take(name, name)
    if named in _BATCHED and said.get("rescale_acts_by_decoder_norm", True) is True:
        _fold_norms(tensors)
    if "scaling_factor" in tensors.names:
        _fold_scales(tensors, said, cfg)
    return tensors.stored(cfg)


def _threshold(tensors: Tensors, cfg: SaeConfig) -> None:
    """The threshold of a checkpoint of a training: one number for all features, or their logarithms."""
    name = tensors.first("topk_threshold", "log_threshold") or "threshold"
    found = tensors.array(name)
    tensors.put(
        "threshold", np.full(cfg.d_sae, found) if name == "topk_threshold" and not found.ndim else np.exp(found)
    )


def _fold_norms(tensors: Tensors) -> None:
    """Batchtopk chooses features by their activation times their row's norm: the encoder takes the norms over."""
    norms = np.maximum(np.linalg.norm(tensors.weights["W_dec"], axis=-1), np.float32(_SMALLEST))
    tensors.put("W_enc", tensors.weights["W_enc"] * norms)
    tensors.put("b_enc", tensors.weights["b_enc"] * norms)
    tensors.put("W_dec", tensors.weights["W_dec"] / norms[:, None])


def _fold_scales(tensors: Tensors, said: Mapping[str, Json], cfg: SaeConfig) -> None:
    """Factors of features that were finetuned after the training: they act on the way to the decoder, so its rows take them."""
    scales = tensors.array("scaling_factor")
    if np.allclose(scales, 1):
        return  # written for a while by trainings that had none
    if said.get("finetuning_scaling_factor") is not True or scales.shape != (cfg.d_sae,):
        raise InputError(
            f"{FILE}: it holds factors of features (scaling_factor) that {CONFIG} does not ask for "
            "(finetuning_scaling_factor). One of the two is another SAE's."
        )
    tensors.put("W_dec", tensors.weights["W_dec"] * scales[:, None])


def write(folder: Path, cfg: SaeConfig, weights: Mapping[str, Array]) -> None:
    """Writes an SAE as SAELens does, which opens it.

    Args:
        folder: The folder, empty.
        cfg: Its settings.
        weights: Its weights.

    Raises:
        OSError: It cannot be written.
    """
    metadata: dict[str, Json] = {
        "sae_lens_version": _VERSION,
        **cfg.metadata,
        "hook_name": cfg.hook,
        **({"hook_name_out": cfg.hook_out} if cfg.hook_out is not None else {}),
        "model_name": cfg.model_name,
        "context_size": cfg.context_size,
        "prepend_bos": cfg.prepend_bos,
    }
    if not _is_new(metadata["sae_lens_version"]):
        metadata["sae_lens_version"] = _VERSION
    keeping = cfg.is_transcoder and cfg.k is not None
    said: dict[str, Json] = {
        "architecture": (_KEEPING if keeping else "") + cfg.architecture,
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        **({"d_out": cfg.width_out} if cfg.is_transcoder else {}),
        **({"k": cfg.k} if cfg.k is not None else {}),
        **({"rescale_acts_by_decoder_norm": cfg.rescale_acts_by_decoder_norm} if cfg.architecture == "topk" else {}),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
        "normalize_activations": cfg.normalize_activations,
        "reshape_activations": cfg.reshape_activations,
        "metadata": metadata,
    }
    (folder / CONFIG).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    entries = {name: TensorEntry("F32", array.shape, 0, array.nbytes) for name, array in weights.items()}
    write_safetensors(folder / FILE, entries, weights.values())


LAYOUT = Layout(
    "SAELens",
    (CONFIG, FILE),
    (),
    _read,
    "every architecture below; settings of its versions 2 to 6; checkpoints of its trainings, batchtopk and matryoshka too",
    "`cfg.json`",
)
