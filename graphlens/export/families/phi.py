"""Phi 1, 1.5 and 2: attention and MLP side by side behind one norm, rotary positions on a part of each head, biases."""

from __future__ import annotations

from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import Family, register
from graphlens.export.families.official_names import official_names
from graphlens.export.families.parts import attention_of, llama_like
from graphlens.export.families.spec import Mlp, Norms, Spec


def spec(c: ConfigReader) -> Spec:
    """What Phi computes."""
    c.get("partial_rotary_factor")  # transformers copies it to rope_parameters
    normed = c.get("qk_layernorm")
    return llama_like(
        c,
        norms=Norms("LN", c.number("layer_norm_eps")),
        attention=attention_of(
            c, out="dense", q_norm="q_layernorm" if normed else None, k_norm="k_layernorm" if normed else None
        ),
        mlp=Mlp(c.size("intermediate_size"), c.get("hidden_act"), up="fc1", down="fc2"),
        final_norm="model.final_layernorm",
        ln2="input_layernorm",
        parallel=True,
    )


PHI = register(
    Family(
        architecture="PhiForCausalLM",
        model_types=("phi",),
        spec=spec,
        prepends_bos=False,
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        prefixes=("model.",),
        aliases=official_names("PhiForCausalLM"),
    )
)
