"""TransformerLens 3.9's HookedTransformer of a tiny variant: the oracle of every hook point, where it is right."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.families.exports import reference_of
from tests.families.variants import VARIANTS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformer_lens
    from transformer_lens import loading_from_pretrained as loading
    from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig

PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")


def lens_of(name: str, checkpoint: Path, **processing: bool) -> transformer_lens.HookedTransformer:
    """A variant as TransformerLens has it, on the CPU, without a tokenizer.

    Args:
        name: The variant.
        checkpoint: Its checkpoint folder.
        processing: Steps of weight processing that are done; none by default.
    """
    official = VARIANTS[name].lens
    assert official is not None, f"TransformerLens is no oracle of {name}: {VARIANTS[name].why_not}"
    model = reference_of(checkpoint)
    flags = dict.fromkeys((*PROCESSING, "refactor_factored_attn_matrices"), False) | processing
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A folder of its own: TransformerLens takes a path with "llama" or "gemma" in it for a name.
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        with patch.object(loading.AutoConfig, "from_pretrained", return_value=_with_old_names(model.config)):
            fields = loading.convert_hf_model_config(official or folder)
            fields |= _sizes(model.config, named=bool(official))
            if flags["fold_ln"] and fields["original_architecture"] not in loading.POST_NORM_ARCHITECTURES:
                fields["normalization_type"] += "Pre"
            config = HookedTransformerConfig.from_dict(fields)
            state = loading.get_pretrained_state_dict(official or folder, config, model, dtype=torch.float32)
        lens = transformer_lens.HookedTransformer(config, None, move_to_device=False)
        lens.load_and_process_state_dict(state, **flags)
    return lens.eval().requires_grad_(False)


def _with_old_names(config: Any) -> Any:
    """transformers' config with what TransformerLens reads of it and transformers 5 has under other names."""
    ropes = getattr(config, "rope_parameters", None) or {}
    if hasattr(config, "n_positions"):
        config.n_ctx = config.n_positions
    if "partial_rotary_factor" in ropes and not hasattr(config, "partial_rotary_factor"):
        config.partial_rotary_factor = ropes["partial_rotary_factor"]
    if ropes.get("rope_type", "default") != "default" and not hasattr(config, "rope_scaling"):
        config.rope_scaling = ropes
    return config


def _sizes(config: Any, named: bool) -> dict[str, Any]:
    """Fields of TransformerLens's config that it takes for those of another model, or for usual ones.

    Args:
        config: transformers' config.
        named: True if the rest of its config is that of an official name.
    """
    fields: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "init_weights": False, "tokenizer_name": None}
    fields["model_name"] = "tiny"
    fields["n_ctx"] = config.max_position_embeddings if hasattr(config, "max_position_embeddings") else 64
    if getattr(config, "n_inner", None):
        fields["d_mlp"] = config.n_inner
    if getattr(config, "head_dim", None):
        fields["d_head"] = config.head_dim
    if not named:
        return fields
    ropes, heads = config.rope_parameters, config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    fields |= {
        "d_model": config.hidden_size,
        "d_head": d_head,
        "n_heads": heads,
        "n_key_value_heads": None if config.num_key_value_heads == heads else config.num_key_value_heads,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "d_vocab": config.vocab_size,
        "rotary_dim": d_head,
        "rotary_base": ropes.get("full_attention", ropes)["rope_theta"],
        "attn_types": ["global"] * config.num_hidden_layers,
    }
    if "sliding_attention" in ropes:
        fields["rotary_base_local"] = ropes["sliding_attention"]["rope_theta"]
    if getattr(config, "rms_norm_eps", None):
        fields["eps"] = config.rms_norm_eps
    if getattr(config, "sliding_window", None):
        fields["window_size"] = config.sliding_window
        fields["attn_types"] = ["local" if kind == "sliding_attention" else "global" for kind in config.layer_types]
    if getattr(config, "query_pre_attn_scalar", None):
        fields["attn_scale"] = config.query_pre_attn_scalar**0.5
    for ours, theirs in (
        ("attn_logit_softcapping", "attn_scores_soft_cap"),
        ("final_logit_softcapping", "output_logits_soft_cap"),
        ("hidden_act", "act_fn"),
        ("hidden_activation", "act_fn"),
        ("clip_qkv", "clip_qkv"),
    ):
        if getattr(config, ours, None) is not None:
            fields[theirs] = getattr(config, ours)
    return fields
