"""The config of every family is what TransformerLens 3.9 makes of the same checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from graphlens.export.checkpoint import read_checkpoint
from graphlens.file.manifest import ModelConfig
from tests.families.variants import VARIANTS

# Fields that TransformerLens has under the same names, but for what is told below.
SAME = (
    "n_layers", "n_heads", "d_model", "d_head", "d_mlp", "d_vocab", "act_fn", "eps", "normalization_type",
    "positional_embedding_type", "attn_only", "gated_mlp", "parallel_attn_mlp", "attention_dir", "default_prepend_bos",
    "use_attn_scale", "attn_scale", "attn_scores_soft_cap", "output_logits_soft_cap", "scale_attn_by_inverse_layer_idx",
    "use_local_attn", "window_size", "use_qk_norm", "rotary_adjacent_pairs", "use_normalization_before_and_after", "num_experts",
    "experts_per_token", "d_vocab_out", "post_embedding_ln",
)  # fmt: skip


def config_of(folder: Path) -> ModelConfig:
    """The config that an export of a checkpoint has."""
    checkpoint = read_checkpoint(folder)
    spec = checkpoint.family.spec_of(checkpoint.hf_config(), folder.name)
    return checkpoint.family.model_config(spec, "tiny", "float32")


@pytest.mark.parametrize("name", [name for name in VARIANTS if VARIANTS[name].lens is not None])
def test_a_config_is_transformerlenss(name: str, family_checkpoint: Callable[[str], Path]) -> None:
    from tests.families.lens import lens_of

    ours, theirs = config_of(family_checkpoint(name)), lens_of(name, family_checkpoint(name)).cfg
    expected = {field: getattr(theirs, field) for field in SAME}
    if not theirs.use_attn_scale:
        expected["attn_scale"] = 1.0
    if theirs.original_architecture == "Olmo2ForCausalLM":
        expected["use_qk_norm"] = True  # TransformerLens has the norms, and goes by the architecture's name
    differ = {
        field: (getattr(ours, field), value) for field, value in expected.items() if getattr(ours, field) != value
    }
    assert not differ
    assert ours.n_key_value_heads == (theirs.n_key_value_heads or theirs.n_heads)
    keys = ours.n_heads - ours.n_key_value_heads  # that TransformerLens counts, and no checkpoint stores
    assert ours.n_params == theirs.n_params - 2 * ours.n_layers * ours.d_model * ours.d_head * keys
    rotary = theirs.positional_embedding_type == "rotary"
    assert ours.rotary_dim == (theirs.rotary_dim if rotary else None)
    assert ours.rotary_base == (theirs.rotary_base if rotary else None)
    local = set(theirs.attn_types or ()) - {"global"}
    assert ours.attn_types == (tuple(theirs.attn_types) if local else None)


def test_no_field_is_left_out() -> None:
    apart = {"n_key_value_heads", "rotary_dim", "rotary_base", "attn_types"}
    unlike = {
        "model_name", "original_architecture", "n_ctx", "n_ctx_trained", "dtype",  # of a tiny model that has no name there
        "post_norm_only", "rotary_short", "output_logits_scale", "n_token_types", "residual_norms",  # ours alone
        "image_size", "patch_size", "n_channels", "pre_norm_encoder",  # of adopted models alone
        "final_rms", "late_mlp_bias",  # of models from TransformerLens's configs: see tests/parity/test_lens_configs.py
    }  # fmt: skip
    assert {field.name for field in fields(ModelConfig)} == {*SAME, *apart, *unlike}
