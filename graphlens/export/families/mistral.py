"""Mistral: Llama's decoder, whose layers may see a window of tokens alone."""

from __future__ import annotations

from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import Family, register
from graphlens.export.families.official_names import official_names
from graphlens.export.families.parts import llama_like
from graphlens.export.families.spec import Spec


def spec(c: ConfigReader) -> Spec:
    """What Mistral computes."""
    c.only("layer_types", None)  # transformers ignores them: every layer has the window
    return llama_like(c, windows=True)


MISTRAL = register(
    Family(
        architecture="MistralForCausalLM",
        model_types=("mistral",),
        spec=spec,
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        prefixes=("model.",),
        aliases=official_names("MistralForCausalLM"),
    )
)
