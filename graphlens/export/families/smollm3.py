"""SmolLM 3: Llama's decoder in which every fourth layer has no rotary positions."""

from __future__ import annotations

from dataclasses import replace

from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import Family, register
from graphlens.export.families.parts import attention_of, llama_like, rotary_of
from graphlens.export.families.spec import Spec


def spec(c: ConfigReader) -> Spec:
    """What SmolLM 3 computes."""
    (
        c.get("no_rope_layer_interval"),
        c.get("use_sliding_window"),
    )  # transformers makes no_rope_layers and layer_types of them
    attention = attention_of(c, rotary=False)
    skipped = frozenset(layer for layer, turned in enumerate(c.get("no_rope_layers")) if not turned)
    rotary = replace(rotary_of(c, attention.d_head), skipped=skipped)
    return llama_like(c, windows=True, attention=replace(attention, rotary=rotary))


SMOLLM3 = register(
    Family(
        architecture="SmolLM3ForCausalLM",
        model_types=("smollm3",),
        spec=spec,
        prepends_bos=False,
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        prefixes=("model.",),
        without_effect=frozenset({"max_window_layers"}),  # transformers goes by no_rope_layers
    )
)
