"""Qwen 3: Llama's decoder with a norm of each head's query and key."""

from __future__ import annotations

from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import Family, register
from graphlens.export.families.official_names import official_names
from graphlens.export.families.parts import attention_of, llama_like
from graphlens.export.families.spec import Spec


def spec(c: ConfigReader) -> Spec:
    """What Qwen 3 computes."""
    c.get("use_sliding_window"), c.get("max_window_layers")  # transformers makes sliding_window and layer_types of them
    return llama_like(c, windows=True, attention=attention_of(c, q_norm="q_norm", k_norm="k_norm"))


QWEN3 = register(
    Family(
        architecture="Qwen3ForCausalLM",
        model_types=("qwen3",),
        spec=spec,
        prepends_bos=False,
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        prefixes=("model.",),
        aliases=official_names("Qwen3ForCausalLM"),
    )
)
