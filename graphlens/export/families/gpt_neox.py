"""GPT-NeoX and Pythia: rotary positions on a part of each head, attention and MLP side by side."""

from __future__ import annotations

from dataclasses import replace

from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import Family, register
from graphlens.export.families.official_names import official_names
from graphlens.export.families.parts import attention_of, llama_like, refuse_own_width, rotary_of
from graphlens.export.families.spec import Mlp, Norms, Spec


def spec(c: ConfigReader) -> Spec:
    """What GPT-NeoX computes."""
    refuse_own_width(c)
    c.get("attention_bias")  # a model with biases has parameters of their names
    c.get("rotary_pct"), c.get("rotary_emb_base")  # transformers copies them to rope_parameters
    attention = attention_of(c, rotary=False, module="attention", fused="query_key_value", layout="heads", out="dense")
    return llama_like(
        c,
        norms=Norms("LN", c.number("layer_norm_eps")),
        attention=replace(attention, rotary=rotary_of(c, attention.d_head, "gpt_neox.rotary_emb")),
        mlp=Mlp(c.size("intermediate_size"), c.get("hidden_act"), up="dense_h_to_4h", down="dense_4h_to_h"),
        blocks="gpt_neox.layers",
        embed="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        parallel=c.get("use_parallel_residual", True),
    )


GPT_NEOX = register(
    Family(
        architecture="GPTNeoXForCausalLM",
        model_types=("gpt_neox",),
        spec=spec,
        prepends_bos=False,
        tied={"lm_head.weight": "gpt_neox.embed_in.weight"},
        prefixes=("gpt_neox.",),
        renamed={"lm_head.weight": "embed_out.weight"},
        aliases=official_names("GPTNeoXForCausalLM"),
    )
)
