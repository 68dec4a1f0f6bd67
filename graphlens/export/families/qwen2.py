"""Qwen 1.5, 2 and 2.5: Llama's decoder with biases of queries, keys and values, and windows in the later layers."""

from __future__ import annotations

from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import Family, register
from graphlens.export.families.official_names import official_names
from graphlens.export.families.parts import llama_like
from graphlens.export.families.spec import Spec


def spec(c: ConfigReader) -> Spec:
    """What Qwen 2 computes."""
    c.get("use_sliding_window"), c.get("max_window_layers")  # transformers makes sliding_window and layer_types of them
    return llama_like(c, windows=True)


QWEN2 = register(
    Family(
        architecture="Qwen2ForCausalLM",
        model_types=("qwen2",),
        spec=spec,
        prepends_bos=False,
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        prefixes=("model.",),
        aliases=official_names("Qwen2ForCausalLM"),
    )
)
