"""The architecture of an adopted file: what structure says, completed by the model's ``config.json`` where there is one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from graphlens.errors import ModelFileError
from graphlens.file.folder import CONFIG_FILE, user_path
from graphlens.file.manifest import Json
from graphlens.file.model_config import ModelConfig
from graphlens.file.names import in_block
from graphlens.file.private_paths import public_name
from graphlens.surgery.adopted.hooks import Seen, laid_out
from graphlens.surgery.match.records import Match, Number

# Field -> the keys of transformers' configs that mean it, in the order in which they are looked for.
_KEYS: Mapping[str, tuple[str, ...]] = {
    "n_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "n_heads": ("num_attention_heads", "n_head", "num_heads"),
    "n_key_value_heads": ("num_key_value_heads",),
    "d_model": ("hidden_size", "n_embd", "d_model"),
    "d_head": ("head_dim",),
    "d_mlp": ("intermediate_size", "n_inner", "ffn_dim"),
    "d_vocab": ("vocab_size",),
    "n_ctx": ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"),
    "act_fn": ("hidden_act", "activation_function", "hidden_activation"),
    "n_token_types": ("type_vocab_size",),
    "eps": ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
}
_OF_STRUCTURE = ("n_layers", "n_heads", "n_key_value_heads", "d_model", "d_head", "d_mlp", "d_vocab")
_N_CTX = 2048  # where nothing says


@dataclass(frozen=True)
class Stated:
    """A model's ``config.json``.

    Attributes:
        file: Where it lies.
        asked: True if the user named it; one that merely lies beside a file may be another model's.
        data: What it says.
    """

    file: Path
    asked: bool
    data: Mapping[str, Json]

    def get(self, field: str) -> Json:
        """What it says about a field of ModelConfig; None where it says nothing."""
        inner = self.data.get("text_config")
        for data in (self.data, inner if isinstance(inner, dict) else {}):
            for key in _KEYS[field]:
                if data.get(key) is not None:
                    return data[key]
        return None


def read_config(config: str | os.PathLike[str] | None, original: Path) -> Stated | None:
    """The ``config.json`` of a model, if there is one.

    Args:
        config: The file, or a folder with one, as the user gave it; None looks beside the original.
        original: The file that is adopted.

    Raises:
        ModelFileError: What was given is not there, or no config.
    """
    path = original.parent / CONFIG_FILE if config is None else user_path(config)
    if path.is_dir():
        path = path / CONFIG_FILE
    if config is None and not path.is_file():
        path = original.parent.parent / CONFIG_FILE if original.parent.name == "onnx" else path
        if not path.is_file():
            return None
    try:
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict):
            raise ValueError(f"it holds {type(data).__name__}, not an object")
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: no such file. --config takes the model's config.json.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: no config.json of a model ({error!s:.200}).") from error
    return Stated(path, config is not None, data)


def whole_config(
    found: Match,
    stated: Stated | None,
    original: Path,
    seen: Mapping[str, Seen],
    positions: int | None = None,
    vocabulary: int | None = None,
    types: int | None = None,
) -> ModelConfig:
    """The architecture: what structure says, and the config for what it does not.

    Args:
        found: What matching found.
        stated: The model's ``config.json``.
        original: The file that is adopted.
        seen: What a probe run saw of the graph's values.
        positions: How many positions its table of positions has; None where there is none.
        vocabulary: How many tokens its table of tokens has; None where it was not found.
        types: How many types of tokens its table of types has; None where there is none.

    Raises:
        ModelFileError: The config contradicts the structure, or structure says too little and there is no config.
    """
    facts: dict[str, Number] = {**_sizes(found, seen), **found.config}
    if positions is not None:
        facts["n_ctx"] = positions
    if vocabulary is not None:
        facts.setdefault("d_vocab", vocabulary)
    # One with norms before its sublayers (ModernBERT) has a decoder's blocks. Its tokens attend to later ones all the same:
    # opened as a decoder it would be asked for a next token that it has seen.
    pre_norm = found.kind == "decoder" and facts.get("attention_dir") == "bidirectional"
    encoder = found.kind == "encoder" or pre_norm
    if stated is not None:
        _ensure_agrees(facts, stated, original)
        for name in _KEYS:
            value = stated.get(name)
            fits = name != "n_token_types" or encoder
            if value is not None and fits and name not in facts:
                facts[name] = _checked(name, value, stated)
    if not encoder:
        facts.pop("n_token_types", None)  # types of tokens say encoder: ModelConfig.is_encoder
    if found.kind == "vision":
        facts |= _of_images(found, original, seen)
        if found.ports.logits is None:
            facts["d_vocab"] = facts.get("d_model")  # there are no classes: what a run ends in
    if pre_norm:
        facts["pre_norm_encoder"] = True
    if encoder:
        facts.setdefault("attention_dir", "bidirectional")
        facts.setdefault("n_token_types", types or (1 if found.ports.token_type_ids is None else 2))
        facts.setdefault("default_prepend_bos", False)
    facts.setdefault("n_key_value_heads", facts.get("n_heads"))
    if facts.get("d_head") is None and _integer(facts.get("d_model")) and _integer(facts.get("n_heads")):
        facts["d_head"] = int(facts["d_model"]) // int(facts["n_heads"])  # type: ignore[arg-type]
    facts.setdefault("n_ctx", _N_CTX)
    facts.setdefault("eps", 1e-5)
    facts.setdefault("act_fn", "unknown")
    facts.setdefault("positional_embedding_type", "standard")
    facts.setdefault("normalization_type", None)
    stream = found.hooks.get(in_block(0, "hook_resid_pre"))
    facts.setdefault("dtype", "float32" if stream is None else seen[stream.value].dtype)
    facts.setdefault("model_name", _name(stated, original))
    facts.setdefault("original_architecture", _architecture(stated))
    known = {item.name for item in fields(ModelConfig)}
    lacking = [name for name in _OF_STRUCTURE if not _integer(facts.get(name))]
    if lacking:
        raise ModelFileError(
            f"{original}: its structure does not tell {', '.join(lacking)}. Pass the model's config.json (--config)."
        )
    try:
        return ModelConfig(**{name: value for name, value in facts.items() if name in known})  # type: ignore[arg-type]
    except TypeError as error:
        raise ModelFileError(f"{original}: its structure tells too little ({error}). Pass --config.") from error


# Hook points, and what their axes of a size of the model's are called in its config.
_SIZED: Mapping[str, Mapping[int, str]] = {
    "attn.hook_z": {2: "n_heads", 3: "d_head"},
    "attn.hook_v": {2: "n_key_value_heads"},
    "hook_resid_pre": {2: "d_model"},
    "mlp.hook_post": {2: "d_mlp"},
}


def _sizes(found: Match, seen: Mapping[str, Seen]) -> dict[str, Number]:
    """The sizes that the hook points of the first block have, and the logits."""
    sizes: dict[str, Number] = {}
    for name, axes in _SIZED.items():
        view = found.hooks.get(in_block(0, name))
        if view is not None and view.value in seen:
            shape = laid_out(view, seen)
            sizes |= {field: shape[axis] for axis, field in axes.items() if axis < len(shape)}
    logits = seen.get(found.ports.logits or "")
    if logits is not None:
        sizes["d_vocab"] = logits.shape[-1]
    elif "d_model" in sizes:
        sizes["d_vocab_out"] = sizes["d_model"]  # of what a run ends in
    return sizes


def _of_images(found: Match, original: Path, seen: Mapping[str, Seen]) -> dict[str, Number]:
    """The sizes of a vision model's images, patches and positions. Raises ModelFileError for images that are no squares."""
    _, channels, height, width = seen[found.ports.input].shape
    stream = found.hooks.get(in_block(0, "hook_resid_pre"))
    if height != width or stream is None:
        raise ModelFileError(
            f"{original}: its images are {height} x {width}; graphlens adopts vision transformers of square images whose "
            "residual stream it finds. graphlens expose adds any of its values as outputs."
        )
    positions = seen[stream.value].shape[1]
    patches = math.isqrt(positions)  # one token more is the class token
    sizes: dict[str, Number] = {"image_size": height, "n_channels": channels, "n_ctx": positions}
    if patches and height % patches == 0:
        sizes["patch_size"] = height // patches
    return {**sizes, "attention_dir": "bidirectional", "default_prepend_bos": False}


def _checked(name: str, value: Json, stated: Stated) -> Number:
    """What a config says about a field. Raises ModelFileError for what no model has."""
    right = isinstance(value, str) and bool(value)
    if name != "act_fn":
        most = 2**31 if name != "n_layers" else 10_000
        kinds = (int, float) if name == "eps" else (int,)
        right = type(value) in kinds and isinstance(value, (int, float)) and 0 < value <= most
    if not right or not isinstance(value, (int, float, str)):
        raise ModelFileError(f"{stated.file}: its {' or '.join(_KEYS[name])} is {value!r:.60}, which no model has.")
    return value


def _integer(value: Number) -> bool:
    return type(value) is int


def _ensure_agrees(facts: Mapping[str, Number], stated: Stated, original: Path) -> None:
    """Refuses a config that says otherwise than the structure."""
    wrong = []
    for name in _OF_STRUCTURE:
        value = stated.get(name)
        if name in facts and type(value) is int and value != facts[name]:
            wrong.append(f"{name} {value} (the file has {facts[name]})")
    if wrong:
        instead = "Pass the right one" if stated.asked else "Pass the right one with --config, or move this one away"
        raise ModelFileError(f"{stated.file}: another model's config: it says {', '.join(wrong)}. {instead}.")


def _name(stated: Stated | None, original: Path) -> str:
    said = None if stated is None else stated.data.get("_name_or_path")
    if isinstance(said, str) and said:
        return public_name(said)
    return original.stem if original.stem != "model" else original.resolve().parent.name


def _architecture(stated: Stated | None) -> str:
    said = None if stated is None else stated.data.get("architectures")
    return said[0] if isinstance(said, Sequence) and said and isinstance(said[0], str) else "adopted"
