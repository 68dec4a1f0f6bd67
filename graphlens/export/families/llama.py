"""Llama 1 to 3 and what is built like it: rotary positions, RMSNorm, grouped keys and values, a gated MLP."""

from __future__ import annotations

from graphlens.export.families.family import Family, register
from graphlens.export.families.official_names import official_names
from graphlens.export.families.parts import llama_like

LLAMA = register(
    Family(
        architecture="LlamaForCausalLM",
        model_types=("llama",),
        spec=llama_like,
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        prefixes=("model.",),
        aliases=official_names("LlamaForCausalLM"),
    )
)
