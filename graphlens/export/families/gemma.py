"""Gemma 1: Llama's decoder with scaled embeddings, and norms whose stored weights are the factors less 1."""

from __future__ import annotations

from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import Family, register
from graphlens.export.families.official_names import official_names
from graphlens.export.families.parts import llama_like
from graphlens.export.families.spec import Norms, Spec


def spec(c: ConfigReader) -> Spec:
    """What Gemma 1 computes."""
    c.only("use_bidirectional_attention", False)
    return llama_like(
        c,
        norms=Norms("RMS", c.number("rms_norm_eps"), plus_one=True),
        embed_scale=c.size("hidden_size") ** 0.5,
    )


GEMMA = register(
    Family(
        architecture="GemmaForCausalLM",
        model_types=("gemma",),
        spec=spec,
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        prefixes=("model.",),
        without_effect=frozenset({"hidden_activation"}),  # of old config files; transformers reads hidden_act
        aliases=official_names("GemmaForCausalLM"),
    )
)
