"""GPT-J: attention and MLP side by side behind one norm, and rotary positions that turn neighbouring dimensions."""

from __future__ import annotations

from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import Family, register
from graphlens.export.families.official_names import official_names
from graphlens.export.families.spec import Attention, Mlp, Norms, Rotary, Spec


def spec(c: ConfigReader) -> Spec:
    """What GPT-J computes."""
    n_heads, d_model = c.size("n_head"), c.size("n_embd")
    d_head = d_model // n_heads
    rotary = Rotary("embed_positions", c.size("rotary_dim", d_model), base=10000.0, in_attention=True, pairs=True)
    return Spec(
        n_layers=c.size("n_layer"),
        d_model=d_model,
        d_vocab=c.size("vocab_size"),
        n_ctx=c.size("n_positions"),
        norms=Norms("LN", c.number("layer_norm_epsilon")),
        attention=Attention(
            n_heads, n_heads, d_head, d_head**-0.5 if d_head else 1.0, module="attn", out="out_proj", rotary=rotary
        ),
        mlp=Mlp(c.size("n_inner", 4 * d_model), c.get("activation_function"), up="fc_in", down="fc_out"),
        blocks="transformer.h",
        embed="transformer.wte",
        final_norm="transformer.ln_f",
        ln1="ln_1",
        ln2="ln_1",
        parallel=True,
    )


GPTJ = register(
    Family(
        architecture="GPTJForCausalLM",
        model_types=("gptj",),
        spec=spec,
        tied={"lm_head.weight": "transformer.wte.weight"},
        prefixes=("transformer.",),
        without_effect=frozenset({"n_ctx", "rotary", "scale_attn_weights", "gradient_checkpointing"}),
        aliases=official_names("GPTJForCausalLM"),
    )
)
