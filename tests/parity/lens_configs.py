"""Configs of TransformerLens's own models, one for each thing that a config can ask for, and random models of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from graphlens.pipelines import from_config

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformer_lens import HookedTransformer as Lens
    from transformer_lens import HookedTransformerConfig as LensConfig

# Odd sizes: five dimensions for three heads of a width of 11, and another number of logits than of tokens.
_SMALL: Mapping[str, Any] = {
    "n_layers": 2, "d_model": 11, "d_head": 5, "n_heads": 3, "d_mlp": 17, "n_ctx": 16, "d_vocab": 23, "act_fn": "relu",
    "device": "cpu",
}  # fmt: skip
_EVEN: Mapping[str, Any] = {**_SMALL, "d_head": 6}
_GROUPED = {"n_heads": 4, "n_key_value_heads": 2}
_LOCAL = {"use_local_attn": True, "window_size": 3, "attn_types": ["local", "global"]}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "plain": _SMALL,
    "attn_only": {**_SMALL, "attn_only": True},
    "attn_only_no_norm": {**_SMALL, "attn_only": True, "normalization_type": None},
    "no_norm": {**_SMALL, "normalization_type": None, "d_vocab_out": 7},
    "ln_pre": {**_SMALL, "normalization_type": "LNPre", "act_fn": "gelu_new"},
    "rms": {**_SMALL, "normalization_type": "RMS", "act_fn": "gelu", "use_attn_scale": False},
    "rms_pre": {**_SMALL, "normalization_type": "RMSPre", "act_fn": "gelu_fast", "attn_scale": 1.7},
    "final_rms": {**_SMALL, "final_rms": True, "act_fn": "gelu_pytorch_tanh"},
    "final_rms_pre": {**_SMALL, "final_rms": True, "normalization_type": "LNPre"},
    "solu_ln": {**_SMALL, "act_fn": "solu_ln"},
    "solu_ln_pre": {**_SMALL, "act_fn": "solu_ln", "normalization_type": "LNPre", "d_vocab_out": 5},
    "solu_ln_rms": {**_SMALL, "act_fn": "solu_ln", "normalization_type": "RMS"},
    "solu": {**_SMALL, "act_fn": "solu", "scale_attn_by_inverse_layer_idx": True},
    "relu2": {**_SMALL, "act_fn": "relu2", "post_embedding_ln": True},
    "shortformer": {**_SMALL, "positional_embedding_type": "shortformer", "attn_only": True},
    "shortformer_mlp": {**_SMALL, "positional_embedding_type": "shortformer", "normalization_type": "LNPre"},
    "rotary": {**_EVEN, "positional_embedding_type": "rotary"},
    "rotary_part": {
        **_EVEN, "positional_embedding_type": "rotary", "rotary_dim": 4, "rotary_base": 100,
        "rotary_adjacent_pairs": True, "rotary_scaling_factor": 3.0,
    },
    "rotary_local": {
        **_EVEN, **_LOCAL, "positional_embedding_type": "rotary", "rotary_base_local": 50, "rotary_scaling_factor": 2.0,
    },
    "alibi": {**_SMALL, "positional_embedding_type": "alibi"},
    "local": {**_SMALL, **_LOCAL},
    "parallel": {**_SMALL, "parallel_attn_mlp": True},
    "parallel_no_norm": {**_SMALL, "parallel_attn_mlp": True, "normalization_type": None},
    "gated": {**_SMALL, "gated_mlp": True, "act_fn": "silu"},
    "llama_like": {
        **_EVEN, **_GROUPED, "gated_mlp": True, "act_fn": "silu", "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
    },
    "gemma_like": {
        **_EVEN, **_GROUPED, "gated_mlp": True, "act_fn": "gelu_pytorch_tanh", "normalization_type": "RMS",
        "positional_embedding_type": "rotary", "use_normalization_before_and_after": True, "use_qk_norm": True,
        "attn_scores_soft_cap": 2.0, "output_logits_soft_cap": 3.0,
    },
    "grouped": {**_SMALL, **_GROUPED, "clip_qkv": 0.7},
    "bidirectional": {**_SMALL, "attention_dir": "bidirectional", "d_vocab_out": 2},
}  # fmt: skip


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as its folder has it: every field of TransformerLens's that is JSON."""
    return {name: value for name, value in LensConfig(**config).to_dict().items() if name != "dtype"}


def lens_model(config: Mapping[str, Any], seed: int = 0) -> Lens:
    """TransformerLens's model of a config, every weight far from its initial symmetry."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Lens(LensConfig(**config)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        wide = name.rpartition(".")[2].removeprefix("_")
        spread = 0.5 if wide in ("W_E", "W_pos") or not wide.startswith("W_") else parameter.shape[-2] ** -0.5
        parameter.copy_(torch.randn_like(parameter) * spread + (wide == "w"))
    return model


def bound(config: Mapping[str, Any], model: Lens, folder: Path) -> Path:
    """A hooked folder of a config with the weights of TransformerLens's model."""
    return from_config.bind(settings_of(config), model.state_dict(), folder)
