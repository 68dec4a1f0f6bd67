"""GPT-2: learned positions, LayerNorm before each sublayer, fused q, k, v, an MLP without a gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphlens.export.families.family import Family, Tap, Weight, register

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_BLOCK = "transformer.h.{i}."
# transformers' Conv1D holds q, k and v side by side in the last axis of one matrix [d_model, 3 * d_model].
_FUSED = f"{_BLOCK}attn.c_attn"


def _heads(part: int) -> Weight:
    """W_Q, W_K or W_V [h, d_model, d_head]: part 0, 1 or 2 of the fused matrix."""
    return Weight(f"{_FUSED}.weight", take=(1, part, 3), shape=("d_model", "n_heads", "d_head"), permute=(1, 0, 2))


def _head_bias(part: int) -> Weight:
    """b_Q, b_K or b_V [h, d_head]: part 0, 1 or 2 of the fused bias."""
    return Weight(f"{_FUSED}.bias", take=(0, part, 3), shape=("n_heads", "d_head"))


def _d_mlp(config: PretrainedConfig) -> int:
    """The size of the MLP's hidden layer; GPT-2's checkpoints leave it out."""
    size: int = 4 * config.n_embd if config.n_inner is None else config.n_inner
    return size


GPT2 = register(
    Family(
        architecture="GPT2LMHeadModel",
        model_types=("gpt2",),
        aliases={
            "gpt2-small": "gpt2",
            "distillgpt2": "distilgpt2",
            "distill-gpt2": "distilgpt2",
            "distil-gpt2": "distilgpt2",
            "gpt2-xs": "distilgpt2",
        },
        blocks="transformer.h",
        top={
            "transformer.wte": Tap(after="hook_embed"),
            "transformer.wpe": Tap(after="hook_pos_embed"),
            "lm_head": Tap(before="unembed.hook_in", after="unembed.hook_out"),
        },
        block={
            "": Tap(before="hook_resid_pre", after="hook_resid_post"),
            "attn": Tap(after="hook_attn_out"),
            "ln_2": Tap(before="hook_resid_mid"),
            "mlp.c_fc": Tap(after="mlp.hook_pre"),
            "mlp.c_proj": Tap(before="mlp.hook_post", after="hook_mlp_out"),
        },
        norms={"ln_1": "ln1", "ln_2": "ln2"},
        final_norm="transformer.ln_f",
        pos_embed="transformer.wpe",
        config={
            "n_layers": "n_layer",
            "n_heads": "n_head",
            "n_key_value_heads": "n_head",
            "d_model": "n_embd",
            "d_head": lambda config: config.n_embd // config.n_head,
            "d_mlp": _d_mlp,
            "d_vocab": "vocab_size",
            "n_ctx": "n_positions",
            "act_fn": "activation_function",
            "eps": "layer_norm_epsilon",
        },
        constants={
            "normalization_type": "LN",
            "positional_embedding_type": "standard",
            "attn_only": False,
            "gated_mlp": False,
            "parallel_attn_mlp": False,
            "attention_dir": "causal",
            "default_prepend_bos": True,
        },
        weights={
            "embed.W_E": Weight("transformer.wte.weight"),
            "pos_embed.W_pos": Weight("transformer.wpe.weight"),
            "ln_final.w": Weight("transformer.ln_f.weight"),
            "ln_final.b": Weight("transformer.ln_f.bias"),
            "unembed.W_U": Weight("lm_head.weight", permute=(1, 0)),
        },
        block_weights={
            "ln1.w": Weight(f"{_BLOCK}ln_1.weight"),
            "ln1.b": Weight(f"{_BLOCK}ln_1.bias"),
            "attn.W_Q": _heads(0),
            "attn.W_K": _heads(1),
            "attn.W_V": _heads(2),
            "attn.b_Q": _head_bias(0),
            "attn.b_K": _head_bias(1),
            "attn.b_V": _head_bias(2),
            "attn.W_O": Weight(f"{_BLOCK}attn.c_proj.weight", shape=("n_heads", "d_head", "d_model")),
            "attn.b_O": Weight(f"{_BLOCK}attn.c_proj.bias"),
            "ln2.w": Weight(f"{_BLOCK}ln_2.weight"),
            "ln2.b": Weight(f"{_BLOCK}ln_2.bias"),
            "mlp.W_in": Weight(f"{_BLOCK}mlp.c_fc.weight"),
            "mlp.b_in": Weight(f"{_BLOCK}mlp.c_fc.bias"),
            "mlp.W_out": Weight(f"{_BLOCK}mlp.c_proj.weight"),
            "mlp.b_out": Weight(f"{_BLOCK}mlp.c_proj.bias"),
        },
        tied={"lm_head.weight": "transformer.wte.weight"},
        prefixes=("transformer.",),
        refused={"add_cross_attention": False, "reorder_and_upcast_attn": False},
        tanh_gelu=("NewGELUActivation",),
    )
)
