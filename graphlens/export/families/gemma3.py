"""Gemma 3 (text): norms before and after each sublayer, norms of queries and keys, windows, two kinds of rotation."""

from __future__ import annotations

from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import Family, register
from graphlens.export.families.official_names import official_names
from graphlens.export.families.parts import attention_of, gemma_like
from graphlens.export.families.spec import Spec


def spec(c: ConfigReader) -> Spec:
    """What Gemma 3 computes."""
    c.only("attn_logit_softcapping", None)  # transformers ignores it
    c.get("_sliding_window_pattern"), c.get("sliding_window_pattern")  # transformers makes layer_types of them
    attention = attention_of(
        c,
        scale=c.number("query_pre_attn_scalar") ** -0.5,
        q_norm="q_norm",
        k_norm="k_norm",
    )
    return gemma_like(c, attention)


GEMMA3 = register(
    Family(
        architecture="Gemma3ForCausalLM",
        model_types=("gemma3_text",),
        spec=spec,
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        prefixes=("model.",),
        aliases=official_names("Gemma3ForCausalLM"),
    )
)
