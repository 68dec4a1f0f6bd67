"""StableLM 2 and 3B: LayerNorm before Llama's sublayers, which may be side by side, and rotary positions on a part."""

from __future__ import annotations

from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import Family, register
from graphlens.export.families.parts import attention_of, llama_like, refuse_own_width
from graphlens.export.families.spec import Norms, Spec


def spec(c: ConfigReader) -> Spec:
    """What StableLM computes."""
    refuse_own_width(c)
    c.only("qk_layernorm", False)  # StableLM 2 12B: norms with weights of each head's own
    c.get("partial_rotary_factor")  # transformers copies it to rope_parameters
    c.get("use_qkv_bias")  # a model with biases has parameters of their names
    parallel = c.get("use_parallel_residual", False)
    return llama_like(
        c,
        norms=Norms("LN", c.number("layer_norm_eps")),
        attention=attention_of(c),
        ln2="input_layernorm" if parallel else "post_attention_layernorm",
        parallel=parallel,
    )


STABLELM = register(
    Family(
        architecture="StableLmForCausalLM",
        model_types=("stablelm",),
        spec=spec,
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        prefixes=("model.",),
        without_effect=frozenset({"norm_eps"}),  # of old config files; transformers reads layer_norm_eps
    )
)
