"""Model families: where a Hugging Face module tree carries TransformerLens's hook points and weights.

Adding an architecture means adding a table here; the tracer reads it and holds no code per family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graphlens.file.manifest import ModelConfig, WeightView


@dataclass(frozen=True)
class Tap:
    """Hook points at a module's boundary: ``before`` names its first input, ``after`` its (first) output."""

    before: str | None = None
    after: str | None = None


@dataclass(frozen=True)
class Weight:
    """Where a TransformerLens weight lives in a checkpoint, as a view of one tensor.

    ``take=(axis, part, parts)`` keeps one of equal parts of an axis; ``shape`` (sizes named by ModelConfig fields)
    splits axes; ``permute`` reorders them last. All three are strided views: no weight is ever copied.
    """

    tensor: str
    take: tuple[int, int, int] | None = None
    shape: tuple[str, ...] | None = None
    permute: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Family:
    """One architecture's table.

    ``top`` and ``block`` map module paths (``block`` ones relative to a block; "" is the block itself) to taps;
    ``norms`` map a block's normalisation modules to ``ln1``/``ln2``. ``config`` maps ModelConfig fields to the
    Hugging Face config attribute that holds them, ``prefixes`` lists the prefixes a checkpoint's keys may lack.
    """

    architecture: str
    model_types: tuple[str, ...]
    blocks: str
    top: Mapping[str, Tap]
    block: Mapping[str, Tap]
    norms: Mapping[str, str]
    final_norm: str
    normalization: str
    config: Mapping[str, str]
    weights: Mapping[str, Weight]
    block_weights: Mapping[str, Weight]
    pos_embed: str | None = None
    tied: Mapping[str, str] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ()
    refused: Mapping[str, Any] = field(default_factory=dict)


def _heads(tensor: str, part: int) -> Weight:
    return Weight(tensor, take=(1, part, 3), shape=("d_model", "n_heads", "d_head"), permute=(1, 0, 2))


def _head_bias(tensor: str, part: int) -> Weight:
    return Weight(tensor, take=(0, part, 3), shape=("n_heads", "d_head"))


GPT2 = Family(
    architecture="GPT2LMHeadModel",
    model_types=("gpt2",),
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
    normalization="LN",
    pos_embed="transformer.wpe",
    config={
        "n_layers": "n_layer",
        "n_heads": "n_head",
        "n_key_value_heads": "n_head",
        "d_model": "n_embd",
        "d_mlp": "n_inner",
        "d_vocab": "vocab_size",
        "n_ctx": "n_positions",
        "act_fn": "activation_function",
        "eps": "layer_norm_epsilon",
    },
    weights={
        "embed.W_E": Weight("transformer.wte.weight"),
        "pos_embed.W_pos": Weight("transformer.wpe.weight"),
        "ln_final.w": Weight("transformer.ln_f.weight"),
        "ln_final.b": Weight("transformer.ln_f.bias"),
        "unembed.W_U": Weight("lm_head.weight", permute=(1, 0)),
    },
    block_weights={
        "ln1.w": Weight("transformer.h.{i}.ln_1.weight"),
        "ln1.b": Weight("transformer.h.{i}.ln_1.bias"),
        "attn.W_Q": _heads("transformer.h.{i}.attn.c_attn.weight", 0),
        "attn.W_K": _heads("transformer.h.{i}.attn.c_attn.weight", 1),
        "attn.W_V": _heads("transformer.h.{i}.attn.c_attn.weight", 2),
        "attn.b_Q": _head_bias("transformer.h.{i}.attn.c_attn.bias", 0),
        "attn.b_K": _head_bias("transformer.h.{i}.attn.c_attn.bias", 1),
        "attn.b_V": _head_bias("transformer.h.{i}.attn.c_attn.bias", 2),
        "attn.W_O": Weight("transformer.h.{i}.attn.c_proj.weight", shape=("n_heads", "d_head", "d_model")),
        "attn.b_O": Weight("transformer.h.{i}.attn.c_proj.bias"),
        "ln2.w": Weight("transformer.h.{i}.ln_2.weight"),
        "ln2.b": Weight("transformer.h.{i}.ln_2.bias"),
        "mlp.W_in": Weight("transformer.h.{i}.mlp.c_fc.weight"),
        "mlp.b_in": Weight("transformer.h.{i}.mlp.c_fc.bias"),
        "mlp.W_out": Weight("transformer.h.{i}.mlp.c_proj.weight"),
        "mlp.b_out": Weight("transformer.h.{i}.mlp.c_proj.bias"),
    },
    tied={"lm_head.weight": "transformer.wte.weight"},
    prefixes=("transformer.",),
    refused={"add_cross_attention": False, "reorder_and_upcast_attn": False},
)

FAMILIES: tuple[Family, ...] = (GPT2,)


def family_for(config: Mapping[str, Any]) -> Family | None:
    """The family whose ``architectures`` entry or ``model_type`` the Hugging Face config (its JSON) names, or None.

    A config that names an architecture outside the table (a classifier, say) has no family, whatever its model type.
    """
    architectures = config.get("architectures") or []
    for family in FAMILIES:
        if architectures:
            if family.architecture in architectures:
                return family
        elif config.get("model_type") in family.model_types:
            return family
    return None


def weight_views(family: Family, config: ModelConfig, key_of: Mapping[str, tuple[str, str]]) -> dict[str, WeightView]:
    """TransformerLens weight names -> views of checkpoint tensors.

    ``key_of`` maps a module parameter name to the (file, key) that stores it.
    """

    def view(weight: Weight, layer: int | None) -> WeightView | None:
        parameter = weight.tensor if layer is None else weight.tensor.format(i=layer)
        if parameter not in key_of:
            return None
        file, key = key_of[parameter]
        shape = tuple(int(getattr(config, size)) for size in weight.shape) if weight.shape else None
        return WeightView(file=file, tensor=key, take=weight.take, shape=shape, permute=weight.permute)

    named = {name: view(weight, None) for name, weight in family.weights.items()}
    for layer in range(config.n_layers):
        named |= {f"blocks.{layer}.{name}": view(weight, layer) for name, weight in family.block_weights.items()}
    return {name: found for name, found in named.items() if found is not None}
