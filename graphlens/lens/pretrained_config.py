"""The configuration of a model by name, without its weights: TransformerLens's ``get_pretrained_model_config``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from graphlens.errors import InputError, checked_number
from graphlens.export.checkpoint import family_of, hf_config_of
from graphlens.export.families import hub_name
from graphlens.export.families.transformer_lens import settings_of
from graphlens.file.folder import CONFIG_FILE
from graphlens.file.manifest import ModelConfig
from graphlens.lens.hub import call_hf_with_retry, select_compatible_kwargs
from graphlens.lens.pretrained import get_checkpoint_labels
from graphlens.model.torch_config import HookedTransformerConfig
from graphlens.pipelines.from_config import read_config
from graphlens.pipelines.hub import EMBEDDED, config_folder, embedded_model
from graphlens.pipelines.lens_checkpoint import settings_in


def get_pretrained_model_config(
    model_name: str,
    hf_cfg: Mapping[str, object] | None = None,
    checkpoint_index: int | None = None,
    checkpoint_value: int | None = None,
    fold_ln: bool = False,
    device: torch.device | str | None = None,
    n_devices: int = 1,
    default_prepend_bos: bool | None = None,
    dtype: torch.dtype = torch.float32,
    first_n_layers: int | None = None,
    n_ctx: int | None = None,
    **kwargs: object,
) -> HookedTransformerConfig:
    """The configuration of a model, of which only ``config.json`` is fetched. It needs transformers.

    Args:
        model_name: A name that ``from_pretrained`` takes, or a checkpoint folder.
        hf_cfg: The content of ``config.json``, to use instead of the model's.
        checkpoint_index: Which of ``get_checkpoint_labels``, for the configuration to tell.
        checkpoint_value: The label itself.
        fold_ln: Whether ``normalization_type`` is that of folded norms.
        device: Told in the configuration.
        n_devices: 1.
        default_prepend_bos: Told in the configuration; None for what the family does.
        dtype: Told in the configuration.
        first_n_layers: Told as the number of layers.
        n_ctx: The longest input, up to what the model was trained for.
        **kwargs: Arguments of ``hf_hub_download``; others are left out.

    Raises:
        ExportError: For a name that is not there, or a model that cannot be exported.
        InputError: For a checkpoint that is not known, ``n_devices`` and ``n_ctx``.
    """
    checked_number(n_devices, "n_devices", least=1, most=1)
    with tempfile.TemporaryDirectory() as folder:
        config = _architecture(model_name, _settings(model_name, hf_cfg, Path(folder), kwargs), n_ctx)
    known = {item.name for item in fields(HookedTransformerConfig)}
    told = {name: value for name, value in asdict(config).items() if name in known}
    told |= {"device": str(device or "cpu"), "dtype": dtype, "init_weights": False, "d_vocab_out": config.d_vocab_out}
    told |= {"rotary_base": config.rotary_base or 10000, "attn_types": list(config.attn_types or []) or None}
    if default_prepend_bos is not None:
        told["default_prepend_bos"] = checked_number(default_prepend_bos, "default_prepend_bos", bool)
    if fold_ln and not config.post_norm_only and config.normalization_type in ("LN", "RMS"):
        told["normalization_type"] = f"{config.normalization_type}Pre"
    if checkpoint_index is not None or checkpoint_value is not None:
        told |= _checkpoint(model_name, checkpoint_index, checkpoint_value)
    if first_n_layers is not None:
        told["n_layers"] = checked_number(first_n_layers, "first_n_layers", least=1, most=config.n_layers)
        told["attn_types"] = None if told["attn_types"] is None else told["attn_types"][:first_n_layers]
    return HookedTransformerConfig.from_dict(told)


def _settings(model_name: str, hf_cfg: Mapping[str, object] | None, stage: Path, options: Mapping[str, object]) -> Path:
    """A folder with the ``config.json`` of a model."""
    if hf_cfg is not None:
        (stage / CONFIG_FILE).write_text(json.dumps(hf_cfg, default=str), encoding="utf-8")
        return stage
    if model_name in EMBEDDED:
        return embedded_model(model_name)
    if Path(model_name).is_dir():
        return Path(model_name)
    from huggingface_hub import hf_hub_download

    taken = select_compatible_kwargs(options, hf_hub_download)
    fetch = partial(hf_hub_download, hub_name(model_name), CONFIG_FILE, **taken)
    return config_folder(model_name, lambda: call_hf_with_retry(fetch))


def _architecture(model_name: str, folder: Path, n_ctx: int | None) -> ModelConfig:
    """What the model of a ``config.json`` is."""
    family = family_of(folder, model_name)
    if family.own:  # a checkpoint in TransformerLens's own format, of which transformers knows nothing
        spec = read_config(settings_of(settings_in(folder)), model_name)[0]
    else:
        spec = family.spec_of(hf_config_of(folder, model_name), model_name)
    return family.model_config(spec, hub_name(model_name).rpartition("/")[2], "float32", n_ctx)


def _checkpoint(model_name: str, index: int | None, value: int | None) -> dict[str, object]:
    """The fields that tell a moment of training."""
    labels, kind = get_checkpoint_labels(model_name)
    if index is not None and not -len(labels) <= index < len(labels):
        raise InputError(f"checkpoint_index={index}: {model_name} has {len(labels)} checkpoints.")
    if index is None and value not in labels:
        raise InputError(
            f"checkpoint_value={value}: {model_name} has none of that {kind}; get_checkpoint_labels lists them."
        )
    at = labels.index(value) if index is None and value is not None else index
    assert at is not None, "one of them was given"
    told = {"checkpoint_index": at, "checkpoint_value": labels[at], "checkpoint_label_type": kind}
    return {"from_checkpoint": True, **told}


def get_num_params_of_pretrained(model_name: str) -> int:
    """The number of parameters in the matrices of a model's attention and MLPs.

    Args:
        model_name: See get_pretrained_model_config.

    Raises:
        ExportError: See there.
    """
    return int(get_pretrained_model_config(model_name).n_params or 0)


@dataclass
class Config:
    """The sizes of a model, as courses write them down; the defaults are GPT-2 small's."""

    d_model: int = 768
    debug: bool = True
    layer_norm_eps: float = 1e-5
    d_vocab: int = 50257
    init_range: float = 0.02
    n_ctx: int = 1024
    d_head: int = 64
    d_mlp: int = 3072
    n_heads: int = 12
    n_layers: int = 12


def get_basic_config(model_name: str, **kwargs: Any) -> Config:
    """The sizes of a model.

    Args:
        model_name: See get_pretrained_model_config.
        **kwargs: Its arguments.

    Raises:
        ExportError: See there.
    """
    read: Callable[..., HookedTransformerConfig] = get_pretrained_model_config
    config = read(model_name, **kwargs)
    sizes = ("d_model", "d_vocab", "n_ctx", "d_head", "d_mlp", "n_heads", "n_layers")
    return Config(**{name: getattr(config, name) for name in sizes})
