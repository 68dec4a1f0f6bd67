"""Bloom: no position embeddings but a bias of the scores by distance (ALiBi), and a norm of the embeddings."""

from __future__ import annotations

from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import N_CTX, Family, register
from graphlens.export.families.official_names import official_names
from graphlens.export.families.spec import Attention, Mlp, Norms, Spec


def spec(c: ConfigReader) -> Spec:
    """What Bloom computes."""
    c.only("apply_residual_connection_post_layernorm", False)
    n_heads, d_model = c.size("n_head"), c.size("hidden_size")
    d_head = d_model // n_heads
    return Spec(
        n_layers=c.size("n_layer"),
        d_model=d_model,
        d_vocab=c.size("vocab_size"),
        n_ctx=N_CTX,
        norms=Norms("LN", c.number("layer_norm_epsilon")),
        attention=Attention(
            n_heads,
            n_heads,
            d_head,
            d_head**-0.5 if d_head else 1.0,
            module="self_attention",
            fused="query_key_value",
            layout="heads",
            out="dense",
            alibi=1.0,
        ),
        mlp=Mlp(4 * d_model, "gelu_fast", up="dense_h_to_4h", down="dense_4h_to_h"),
        blocks="transformer.h",
        embed="transformer.word_embeddings",
        embed_norm="transformer.word_embeddings_layernorm",
        final_norm="transformer.ln_f",
    )


BLOOM = register(
    Family(
        architecture="BloomForCausalLM",
        model_types=("bloom",),
        spec=spec,
        prepends_bos=False,
        tied={"lm_head.weight": "transformer.word_embeddings.weight"},
        prefixes=("transformer.",),
        # How it was trained, and how older code computed the same.
        without_effect=frozenset({
            "slow_but_exact", "attention_softmax_in_fp32", "masked_softmax_fusion", "bias_dropout_fusion", "skip_bias_add",
            "skip_bias_add_qkv", "offset_alibi", "seq_length", "n_inner", "num_attention_heads", "pretraining_pp",
        }),
        aliases=official_names("BloomForCausalLM"),
    )
)  # fmt: skip
