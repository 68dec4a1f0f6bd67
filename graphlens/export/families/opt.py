"""OPT: learned positions whose first two rows stand for padding, ReLU; norms before the sublayers, or after them (OPT-350m)."""

from __future__ import annotations

from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import Family, register
from graphlens.export.families.official_names import official_names
from graphlens.export.families.parts import attention_of, llama_like, refuse_own_width
from graphlens.export.families.spec import Mlp, Norms, Spec


def spec(c: ConfigReader) -> Spec:
    """What OPT computes."""
    after = not c.only("do_layer_norm_before", True, False)
    projected = c.get("word_embed_proj_dim") not in (None, c.size("hidden_size")) and c.size("word_embed_proj_dim") > 0
    refuse_own_width(c)
    c.only("_remove_final_layer_norm", False)
    (
        c.get("enable_bias"),
        c.get("layer_norm_elementwise_affine"),
    )  # such a model has parameters of their names, or lacks them
    return llama_like(
        c,
        norms=Norms("LN", 1e-5),
        attention=attention_of(c, rotary=False, out="out_proj"),
        mlp=Mlp(c.size("ffn_dim"), c.get("activation_function"), module="", up="fc1", down="fc2"),
        blocks="model.decoder.layers",
        embed="model.decoder.embed_tokens",
        pos_embed="model.decoder.embed_positions",
        pos_offset=2,
        final_norm=None if after else "model.decoder.final_layer_norm",
        embed_in="model.decoder.project_in" if projected else None,
        head_in="model.decoder.project_out" if projected else None,
        residual_norms=after,
        ln1="self_attn_layer_norm",
        ln2="final_layer_norm",
    )


OPT = register(
    Family(
        architecture="OPTForCausalLM",
        model_types=("opt",),
        spec=spec,
        tied={"lm_head.weight": "model.decoder.embed_tokens.weight"},
        prefixes=("model.",),
        aliases=official_names("OPTForCausalLM"),
    )
)
