"""GPT-Neo and TinyStories: GPT-2's decoder with scores that nothing divides, and a window in every second layer."""

from __future__ import annotations

from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import Family, register
from graphlens.export.families.official_names import official_names
from graphlens.export.families.spec import Attention, Mlp, Norms, Spec


def spec(c: ConfigReader) -> Spec:
    """What GPT-Neo computes."""
    n_heads, d_model = c.size("num_heads"), c.size("hidden_size")
    c.get("attention_types")  # transformers makes attention_layers of them
    local = frozenset(layer for layer, kind in enumerate(c.get("attention_layers")) if kind == "local")
    return Spec(
        n_layers=c.size("num_layers"),
        d_model=d_model,
        d_vocab=c.size("vocab_size"),
        n_ctx=c.size("max_position_embeddings"),
        norms=Norms("LN", c.number("layer_norm_epsilon")),
        attention=Attention(
            n_heads,
            n_heads,
            d_model // n_heads,
            1.0,
            module="attn.attention",
            out="out_proj",
            window=c.size("window_size"),
            local=local,
        ),
        mlp=Mlp(c.size("intermediate_size", 4 * d_model), c.get("activation_function"), up="c_fc", down="c_proj"),
        blocks="transformer.h",
        embed="transformer.wte",
        pos_embed="transformer.wpe",
        final_norm="transformer.ln_f",
        ln1="ln_1",
        ln2="ln_2",
    )


GPT_NEO = register(
    Family(
        architecture="GPTNeoForCausalLM",
        model_types=("gpt_neo",),
        spec=spec,
        tied={"lm_head.weight": "transformer.wte.weight"},
        prefixes=("transformer.",),
        without_effect=frozenset({"gradient_checkpointing"}),
        aliases=official_names("GPTNeoForCausalLM"),
    )
)
