"""Gemma 2: norms before and after each sublayer, soft caps of scores and logits, a window in every second layer."""

from __future__ import annotations

from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import Family, register
from graphlens.export.families.official_names import official_names
from graphlens.export.families.parts import attention_of, gemma_like
from graphlens.export.families.spec import Spec


def spec(c: ConfigReader) -> Spec:
    """What Gemma 2 computes."""
    attention = attention_of(
        c, scale=c.number("query_pre_attn_scalar") ** -0.5, softcap=c.get("attn_logit_softcapping")
    )
    return gemma_like(c, attention)


GEMMA2 = register(
    Family(
        architecture="Gemma2ForCausalLM",
        model_types=("gemma2",),
        spec=spec,
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        prefixes=("model.",),
        without_effect=frozenset({"hidden_act", "sliding_window_size"}),  # transformers reads others
        aliases=official_names("Gemma2ForCausalLM"),
    )
)
