"""Granite: Llama's decoder with multipliers of the embeddings, the scores, what the sublayers add, and the logits."""

from __future__ import annotations

from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import Family, register
from graphlens.export.families.parts import attention_of, llama_like
from graphlens.export.families.spec import Spec


def spec(c: ConfigReader) -> Spec:
    """What Granite computes."""
    return llama_like(
        c,
        attention=attention_of(c, scale=c.number("attention_multiplier")),
        embed_scale=c.number("embedding_multiplier"),
        residual_scale=c.number("residual_multiplier"),
        logit_scale=1 / c.number("logits_scaling"),
    )


GRANITE = register(
    Family(
        architecture="GraniteForCausalLM",
        model_types=("granite",),
        spec=spec,
        prepends_bos=False,
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        prefixes=("model.",),
    )
)
