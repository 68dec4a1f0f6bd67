"""GPT-2: learned positions, LayerNorm before each sublayer, fused q, k, v, an MLP without a gate."""

from __future__ import annotations

from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import Family, register
from graphlens.export.families.official_names import official_names
from graphlens.export.families.spec import Attention, Mlp, Norms, Spec


def spec(c: ConfigReader) -> Spec:
    """What GPT-2 computes."""
    c.only("add_cross_attention", False)
    c.get("reorder_and_upcast_attn")  # the order of the arithmetic alone
    n_heads, d_model = c.size("n_head"), c.size("n_embd")
    d_head = d_model // n_heads
    return Spec(
        n_layers=c.size("n_layer"),
        d_model=d_model,
        d_vocab=c.size("vocab_size"),
        n_ctx=c.size("n_positions"),
        norms=Norms("LN", c.number("layer_norm_epsilon")),
        attention=Attention(
            n_heads,
            n_heads,
            d_head,
            d_head**-0.5 if c.get("scale_attn_weights", True) and d_head else 1.0,
            module="attn",
            fused="c_attn",
            out="c_proj",
            by_layer=c.get("scale_attn_by_inverse_layer_idx", False),
        ),
        mlp=Mlp(c.size("n_inner", 4 * d_model), c.get("activation_function"), up="c_fc", down="c_proj"),
        blocks="transformer.h",
        embed="transformer.wte",
        pos_embed="transformer.wpe",
        final_norm="transformer.ln_f",
        ln1="ln_1",
        ln2="ln_2",
        transposed=True,
    )


GPT2 = register(
    Family(
        architecture="GPT2LMHeadModel",
        model_types=("gpt2",),
        spec=spec,
        tied={"lm_head.weight": "transformer.wte.weight"},
        prefixes=("transformer.",),
        without_effect=frozenset({"n_ctx"}),
        aliases=official_names("GPT2LMHeadModel"),
    )
)
