"""Falcon (7B, 40B, 180B and 11B): attention and MLP side by side, one key and value for all heads or for each group."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import Family, register
from graphlens.export.families.parts import attention_of, llama_like, rotary_of
from graphlens.export.families.spec import Mlp, Norms, Spec


def spec(c: ConfigReader) -> Spec:
    """What Falcon computes."""
    c.only("alibi", False)  # Falcon-RW: transformers rounds its biases to bfloat16, which is not computed here
    grouped, shared, parallel = c.get("new_decoder_architecture"), c.get("multi_query"), c.get("parallel_attn")
    if grouped:
        c.only("parallel_attn", True)  # transformers computes nothing sensible otherwise
    n_heads = c.size("num_attention_heads")
    heads: dict[str, Any] = {"n_key_value_heads": n_heads, "layout": "heads"}
    if grouped:
        heads = {"n_key_value_heads": c.size("num_kv_heads"), "layout": "groups"}
    elif shared:
        heads = {"n_key_value_heads": 1, "layout": "parts"}
    attention = attention_of(c, rotary=False, module="self_attention", fused="query_key_value", out="dense", **heads)
    norms: dict[str, Any] = {"ln1": "input_layernorm", "ln2": "input_layernorm" if parallel else "post_attention_layernorm"}
    if parallel and c.get("num_ln_in_parallel_attn", 2 if grouped else 1) == 2:
        norms = {"ln1": "ln_attn", "ln2": "ln_mlp"}
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
        parallel=bool(parallel),
        **norms,
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
