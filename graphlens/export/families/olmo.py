"""OLMo 1: Llama's decoder with LayerNorms that have no weights, and queries, keys and values cut to a bound."""

from __future__ import annotations

from dataclasses import replace

from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import Family, register
from graphlens.export.families.official_names import official_names
from graphlens.export.families.parts import attention_of, llama_like
from graphlens.export.families.spec import Norms, Spec


def spec(c: ConfigReader) -> Spec:
    """What OLMo 1 computes."""
    attention = replace(attention_of(c), clip=c.get("clip_qkv"))
    return llama_like(c, norms=Norms("LN", 1e-5), attention=attention)


OLMO = register(
    Family(
        architecture="OlmoForCausalLM",
        model_types=("olmo",),
        spec=spec,
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        prefixes=("model.",),
        aliases=official_names("OlmoForCausalLM"),
    )
)
