"""Falcon (7B, 40B, 180B and 11B): attention and MLP side by side, one key and value for all heads or for each group."""

from __future__ import annotations

from dataclasses import replace

from graphlens.errors import ExportError
from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import Family, register
from graphlens.export.families.parts import attention_of, llama_like, rotary_of
from graphlens.export.families.spec import Mlp, Norms, Spec


def spec(c: ConfigReader) -> Spec:
    """What Falcon computes."""
    if old := [key for key in ("n_head", "n_layer", "n_head_kv") if c.get(key) is not None]:
        raise ExportError(
            f"{c.where}: config.json is that of Falcon's first code ({', '.join(old)}), and transformers' Falcon reads "
            "num_attention_heads, num_hidden_layers and num_kv_heads: it would build a model of other sizes. Download a newer "
            "revision of the checkpoint, or rename these keys."
        )
    c.only("alibi", False)  # Falcon-RW: transformers rounds its biases to bfloat16, which is not computed here
    grouped, shared, parallel = c.get("new_decoder_architecture"), c.get("multi_query"), c.get("parallel_attn")
    if grouped:
        c.only("parallel_attn", True)  # transformers computes nothing sensible otherwise
    if grouped:
        layout, keys = "groups", c.size("num_kv_heads")
    elif shared:
        layout, keys = "parts", 1
    else:
        layout, keys = "heads", c.size("num_attention_heads")
    attention = attention_of(
        c,
        rotary=False,
        module="self_attention",
        fused="query_key_value",
        out="dense",
        layout=layout,
        n_key_value_heads=keys,
    )
    ln1, ln2 = "input_layernorm", "input_layernorm" if parallel else "post_attention_layernorm"
    if parallel and c.get("num_ln_in_parallel_attn", 2 if grouped else 1) == 2:
        ln1, ln2 = "ln_attn", "ln_mlp"
        if not grouped:
            c.only("num_ln_in_parallel_attn", 1)
    return llama_like(
        c,
        norms=Norms("LN", c.number("layer_norm_epsilon")),
        attention=replace(attention, rotary=rotary_of(c, attention.d_head, "transformer.rotary_emb")),
        mlp=Mlp(c.size("ffn_hidden_size"), c.get("activation"), up="dense_h_to_4h", down="dense_4h_to_h"),
        blocks="transformer.h",
        embed="transformer.word_embeddings",
        final_norm="transformer.ln_f",
        ln1=ln1,
        ln2=ln2,
        parallel=bool(parallel),
    )


FALCON = register(
    Family(
        architecture="FalconForCausalLM",
        model_types=("falcon",),
        spec=spec,
        tied={"lm_head.weight": "transformer.word_embeddings.weight"},
        prefixes=("transformer.",),
        without_effect=frozenset({"bias", "num_kv_heads", "apply_residual_connection_post_layernorm", "rotary"}),
    )
)
