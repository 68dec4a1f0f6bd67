"""Phi 3, 3.5 and 4: Llama's decoder with fused matrices, windows, and rotary frequencies that depend on the length."""

from __future__ import annotations

from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import Family, register
from graphlens.export.families.official_names import official_names
from graphlens.export.families.parts import attention_of, llama_like
from graphlens.export.families.spec import Mlp, Spec


def spec(c: ConfigReader) -> Spec:
    """What Phi 3 computes."""
    c.only("layer_types", None)  # transformers ignores them: every layer has the window
    c.get("partial_rotary_factor"), c.get("original_max_position_embeddings")  # copied to rope_parameters
    return llama_like(
        c,
        windows=True,
        attention=attention_of(c, fused="qkv_proj"),
        mlp=Mlp(c.size("intermediate_size"), c.get("hidden_act"), gate_up="gate_up_proj"),
    )


PHI3 = register(
    Family(
        architecture="Phi3ForCausalLM",
        model_types=("phi3",),
        spec=spec,
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        prefixes=("model.",),
        without_effect=frozenset(
            {"full_attn_mod", "interpolate_factor"}
        ),  # of Phi 4's own code; transformers reads neither
        aliases=official_names("Phi3ForCausalLM"),
    )
)
