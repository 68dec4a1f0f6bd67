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


def make(name: str) -> Any:
    """The transformers model of a variant, random, with every parameter far from 0 and from 1."""
    import torch
    import transformers

    variant = VARIANTS[name]
    config = getattr(transformers, variant.config)(**variant.arguments)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.1))
    return model.requires_grad_(False)
