"""Activation patching: TransformerLens's functions, and sweeps over any sites, from any source, with any metrics."""

from __future__ import annotations

from graphlens.analysis.drift_result import Drifted, DriftResult
from graphlens.analysis.result import SweepResult
from graphlens.analysis.sites import Site, Sites, grid
from graphlens.analysis.sources import Cache, HarvestMean, Mean, Noise, Zero
from graphlens.analysis.summary import EffectSummary
from graphlens.experiments.act_patch import (
    act_patch_sites,
    generic_activation_patch,
    get_act_patch_attn_head_all_pos_every,
    get_act_patch_attn_head_by_pos_every,
    get_act_patch_attn_head_k_all_pos,
    get_act_patch_attn_head_k_by_pos,
    get_act_patch_attn_head_out_all_pos,
    get_act_patch_attn_head_out_by_pos,
    get_act_patch_attn_head_pattern_all_pos,
    get_act_patch_attn_head_pattern_by_pos,
    get_act_patch_attn_head_pattern_dest_src_pos,
    get_act_patch_attn_head_q_all_pos,
    get_act_patch_attn_head_q_by_pos,
    get_act_patch_attn_head_v_all_pos,
    get_act_patch_attn_head_v_by_pos,
    get_act_patch_attn_out,
    get_act_patch_block_every,
    get_act_patch_mlp_out,
    get_act_patch_resid_mid,
    get_act_patch_resid_pre,
    make_df_from_ranges,
)
from graphlens.experiments.feature_sweep import feature_sites
from graphlens.experiments.pairs import sweep_pairs
from graphlens.experiments.patch_setters import (
    layer_head_dest_src_pos_pattern_patch_setter,
    layer_head_pattern_patch_setter,
    layer_head_pos_pattern_patch_setter,
    layer_head_vector_patch_setter,
    layer_pos_head_vector_patch_setter,
    layer_pos_patch_setter,
)
from graphlens.experiments.paths import path_patch
from graphlens.experiments.sweep import sweep

__all__ = [
    "Cache",
    "DriftResult",
    "Drifted",
    "EffectSummary",
    "HarvestMean",
    "Mean",
    "Noise",
    "Site",
    "Sites",
    "SweepResult",
    "Zero",
    "act_patch_sites",
    "feature_sites",
    "generic_activation_patch",
    "get_act_patch_attn_head_all_pos_every",
    "get_act_patch_attn_head_by_pos_every",
    "get_act_patch_attn_head_k_all_pos",
    "get_act_patch_attn_head_k_by_pos",
    "get_act_patch_attn_head_out_all_pos",
    "get_act_patch_attn_head_out_by_pos",
    "get_act_patch_attn_head_pattern_all_pos",
    "get_act_patch_attn_head_pattern_by_pos",
    "get_act_patch_attn_head_pattern_dest_src_pos",
    "get_act_patch_attn_head_q_all_pos",
    "get_act_patch_attn_head_q_by_pos",
    "get_act_patch_attn_head_v_all_pos",
    "get_act_patch_attn_head_v_by_pos",
    "get_act_patch_attn_out",
    "get_act_patch_block_every",
    "get_act_patch_mlp_out",
    "get_act_patch_resid_mid",
    "get_act_patch_resid_pre",
    "grid",
    "layer_head_dest_src_pos_pattern_patch_setter",
    "layer_head_pattern_patch_setter",
    "layer_head_pos_pattern_patch_setter",
    "layer_head_vector_patch_setter",
    "layer_pos_head_vector_patch_setter",
    "layer_pos_patch_setter",
    "make_df_from_ranges",
    "path_patch",
    "sweep",
    "sweep_pairs",
]
