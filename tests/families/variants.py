"""Tiny random models of every family: odd sizes, grouped heads, three layers, nothing left at its initial symmetry.

A test of an area (sweeps, gradients, generation) takes its models from here and runs on ``CHOSEN``: GPT-2, Llama, GPT-NeoX
and Gemma 3 always, and three more that the hash of the commit picks. ``GRAPHLENS_FAMILIES`` names others, or ``all``.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ALWAYS = ("gpt2", "llama", "neox", "gemma3")
MORE = 3  # that the commit picks


@dataclass(frozen=True)
class Variant:
    """One model of a family.

    Attributes:
        config: The name of its config class in transformers.
        arguments: What the config is made of.
        lens: How TransformerLens 3.9 gets its config of it: "" from transformers' config; the official name where
            TransformerLens goes by names (its sizes are replaced); None where it is no oracle.
        why_not: Why it is none.
    """

    config: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    lens: str | None = ""
    why_not: str = ""


_SMALL = {"vocab_size": 101, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_LONG = _SMALL | {"max_position_embeddings": 64}
# One key and value for five heads, a width that is not heads times head_dim where a family allows it.
_ONE = _LONG | {
    "hidden_size": 40,
    "intermediate_size": 77,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
}
# Two of them for six heads.
_TWO = _LONG | {
    "hidden_size": 48,
    "intermediate_size": 77,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
_FIVE = _LONG | {"hidden_size": 40, "intermediate_size": 77, "num_hidden_layers": 3, "num_attention_heads": 5}
_GPT2 = {"vocab_size": 101, "n_positions": 64, "n_embd": 40, "n_layer": 3, "n_head": 5, "n_inner": 77}
_GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LOCAL, _FULL = "sliding_attention", "full_attention"
_BIASES_ZEROED = "it sets Llama's biases to zero"
_ONLY_BRIDGE = "its HookedTransformer does not know the architecture"
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.5, 2.0, 3.0, 5.0],
    "original_max_position_embeddings": 16,
}


def _partly(share: float) -> dict[str, Any]:
    """Rotary embeddings of a share of each head."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}}


_OPT = _LONG | {"hidden_size": 40, "ffn_dim": 77, "num_hidden_layers": 3, "num_attention_heads": 5}
_FALCON = _LONG | {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "ffn_hidden_size": 77}
_BLOOM = _SMALL | {"hidden_size": 40, "n_layer": 3}
_EXPERTS = _TWO | {"intermediate_size": 80, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None}

VARIANTS: dict[str, Variant] = {
    # GPT-2
    "gpt2": Variant("GPT2Config", _GPT2),
    "gpt2-by-layer": Variant("GPT2Config", _GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
    # Llama
    "llama": Variant("LlamaConfig", _TWO),
    "llama-llama3-rope": Variant("LlamaConfig", _TWO | {"rope_parameters": _LLAMA3_ROPE}),
    "llama-linear-rope": Variant(
        "LlamaConfig",
        _TWO | {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        lens=None,
        why_not="it ignores linear rope scaling",
    ),
    "llama-yarn": Variant(
        "LlamaConfig",
        _TWO
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        lens=None,
        why_not="it ignores YaRN",
    ),
    "llama-tied-biases": Variant(
        "LlamaConfig",
        _TWO | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        lens=None,
        why_not=_BIASES_ZEROED,
    ),
    "llama-one-key": Variant("LlamaConfig", _ONE | {"tie_word_embeddings": True}),
    # GPT-NeoX
    "neox": Variant("GPTNeoXConfig", _FIVE | {"rotary_pct": 0.25}),
    "neox-sequential": Variant("GPTNeoXConfig", _FIVE | {"rotary_pct": 0.25, "use_parallel_residual": False}),
    # Qwen 3
    "qwen3": Variant("Qwen3Config", _ONE | {"head_dim": 10}),
    # Gemma 3
    "gemma3": Variant(
        "Gemma3TextConfig",
        _ONE
        | {
            "head_dim": 12,
            "sliding_window": 4,
            "query_pre_attn_scalar": 20,
            "layer_types": [_LOCAL, _LOCAL, _FULL],
        },
        lens="google/gemma-3-270m",
    ),
    # Mistral
    "mistral": Variant("MistralConfig", _ONE | {"head_dim": 10, "sliding_window": 4}),
    "mistral-full": Variant("MistralConfig", _TWO | {"sliding_window": None}),
    # Qwen 1.5 to 2.5
    "qwen2": Variant("Qwen2Config", _TWO),
    "qwen2-yarn": Variant("Qwen2Config", _TWO | {"rope_parameters": _YARN}, lens=None, why_not="it ignores YaRN"),
    "qwen2-window": Variant(
        "Qwen2Config",
        _TWO | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "tie_word_embeddings": True},
        lens=None,
        why_not="it ignores Qwen 2's windows",
    ),
    # Gemma 1 and 2
    "gemma": Variant("GemmaConfig", _ONE | {"head_dim": 12}, lens="google/gemma-2b"),
    "gemma2": Variant(
        "Gemma2Config",
        _ONE
        | {
            "head_dim": 12,
            "sliding_window": 4,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
        lens="google/gemma-2-2b",
    ),
    # Phi
    "phi": Variant("PhiConfig", _FIVE | _partly(0.5)),
    "phi-normed": Variant(
        "PhiConfig",
        _TWO | _partly(0.5) | {"qk_layernorm": True},
        lens=None,
        why_not="it knows neither Phi's grouped keys nor its norms of queries and keys",
    ),
    "phi3": Variant("Phi3Config", _TWO | {"sliding_window": 4}),
    "phi3-longrope": Variant(
        "Phi3Config",
        _TWO | {"original_max_position_embeddings": 16, "rope_parameters": _LONG_ROPE},
        lens=None,
        why_not="it ignores longrope",
    ),
    # GPT-J and GPT-Neo
    "gptj": Variant("GPTJConfig", _GPT2 | {"rotary_dim": 4, "n_inner": None}),
    "gpt-neo": Variant(
        "GPTNeoConfig",
        _LONG
        | {
            "hidden_size": 40,
            "num_layers": 4,
            "num_heads": 5,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 4,
        },
    ),
    # OPT
    "opt": Variant("OPTConfig", _OPT | {"word_embed_proj_dim": 40}),
    "opt-350m": Variant(
        "OPTConfig",
        _OPT | {"word_embed_proj_dim": 24, "do_layer_norm_before": False},
        lens=None,
        why_not="it ignores that OPT-350m normalises after the sublayers and projects its embeddings",
    ),
    "opt-projected": Variant(
        "OPTConfig", _OPT | {"word_embed_proj_dim": 24}, lens=None, why_not="it ignores projections of embeddings"
    ),
    # OLMo 1 and 2
    "olmo": Variant("OlmoConfig", _TWO | {"num_key_value_heads": 6, "clip_qkv": 0.3}, lens="allenai/OLMo-1B-hf"),
    "olmo-grouped": Variant("OlmoConfig", _TWO, lens=None, why_not="it refuses OLMo with grouped keys"),
    "olmo2": Variant("Olmo2Config", _TWO | {"num_key_value_heads": 6}, lens="allenai/OLMo-2-0425-1B"),
    "olmo2-grouped": Variant("Olmo2Config", _TWO, lens=None, why_not="it refuses OLMo with grouped keys"),
    # Bloom
    "bloom": Variant("BloomConfig", _BLOOM | {"n_head": 4}),
    "bloom-odd": Variant(
        "BloomConfig", _BLOOM | {"n_head": 5}, lens=None, why_not="its slopes are wrong unless heads are a power of two"
    ),
    # Falcon
    "falcon-7b": Variant("FalconConfig", _FALCON, lens=None, why_not=_ONLY_BRIDGE),
    "falcon-40b": Variant(
        "FalconConfig",
        _FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True, "tie_word_embeddings": False},
        lens=None,
        why_not=_ONLY_BRIDGE,
    ),
    "falcon-11b": Variant(
        "FalconConfig",
        _FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
        lens=None,
        why_not=_ONLY_BRIDGE,
    ),
    "falcon-serial": Variant(
        "FalconConfig",
        _FALCON | {"multi_query": False, "parallel_attn": False, "bias": True},
        lens=None,
        why_not=_ONLY_BRIDGE,
    ),
    # StableLM, SmolLM 3, Granite
    "stablelm": Variant(
        "StableLmConfig", _TWO | _partly(0.25) | {"use_qkv_bias": True}, lens=None, why_not=_ONLY_BRIDGE
    ),
    "stablelm-parallel": Variant(
        "StableLmConfig", _TWO | _partly(0.25) | {"use_parallel_residual": True}, lens=None, why_not=_ONLY_BRIDGE
    ),
    "smollm3": Variant("SmolLM3Config", _TWO | {"num_hidden_layers": 5}, lens=None, why_not=_ONLY_BRIDGE),
    "smollm3-window": Variant(
        "SmolLM3Config",
        _TWO | {"num_hidden_layers": 5, "use_sliding_window": True, "sliding_window": 4},
        lens=None,
        why_not=_ONLY_BRIDGE,
    ),
    "granite": Variant(
        "GraniteConfig",
        _TWO
        | {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.5,
            "logits_scaling": 4.0,
        },
        lens=None,
        why_not=_ONLY_BRIDGE,
    ),
    # Mixtral
    "mixtral": Variant("MixtralConfig", _EXPERTS),
    "mixtral-window": Variant("MixtralConfig", _EXPERTS | {"num_local_experts": 3, "sliding_window": 4}),
}


def chosen() -> tuple[str, ...]:
    """The names of the variants that a test run takes."""
    asked = os.environ.get("GRAPHLENS_FAMILIES", "")
    if asked == "all":
        return tuple(VARIANTS)
    if asked:
        return tuple(name.strip() for name in asked.split(","))
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    commit = found.stdout.strip()
    others = [name for name in VARIANTS if name not in ALWAYS] if commit else []
    return (*ALWAYS, *sorted(others, key=lambda name: hashlib.sha256((commit + name).encode()).digest())[:MORE])


CHOSEN = chosen()
# Those whose residual stream is normalised on the way, and no sum of what was written to it; those without weight processing.
NORMALISED = ("opt-350m",)
UNPROCESSED = (*NORMALISED, "opt-projected")
SUMMED = tuple(name for name in CHOSEN if name not in NORMALISED)
PROCESSED = tuple(name for name in CHOSEN if name not in UNPROCESSED)


def make(name: str, **changes: Any) -> Any:
    """The transformers model of a variant, random, with every parameter far from 0 and from 1.

    Args:
        name: The variant.
        changes: Values of its config that are otherwise.
    """
    import torch
    import transformers

    variant = VARIANTS[name]
    config = getattr(transformers, variant.config)(**{**variant.arguments, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.1))
    return model.requires_grad_(False)
