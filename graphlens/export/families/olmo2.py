"""OLMo 2: norms after the sublayers and none before, and norms of all heads' queries and keys together."""

from __future__ import annotations

from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import Family, register
from graphlens.export.families.official_names import official_names
from graphlens.export.families.parts import attention_of, llama_like
from graphlens.export.families.spec import Spec


def spec(c: ConfigReader) -> Spec:
    """What OLMo 2 computes."""
    return llama_like(
        c,
        attention=attention_of(c, q_norm="q_norm", k_norm="k_norm", norm_of_all=True),
        ln1="post_attention_layernorm",
        ln2="post_feedforward_layernorm",
        post_norm_only=True,
    )


OLMO2 = register(
    Family(
        architecture="Olmo2ForCausalLM",
        model_types=("olmo2",),
        spec=spec,
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        prefixes=("model.",),
        aliases=official_names("Olmo2ForCausalLM"),
    )
)
