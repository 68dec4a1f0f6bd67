"""TransformerLens 4's names of hook points beside ours, in a block and outside, as its TransformerBridge has them."""

from __future__ import annotations

from collections.abc import Mapping

# TransformerLens 4's own names (TransformerBridge) for the same points, in a block and outside.
BRIDGE_BLOCK: Mapping[str, str] = {
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "ln2.hook_in": "hook_resid_mid",
    "attn.hook_out": "hook_attn_out",
    "attn.hook_attn_in": "hook_attn_in",
    "attn.hook_q_input": "hook_q_input",
    "attn.hook_k_input": "hook_k_input",
    "attn.hook_v_input": "hook_v_input",
    "attn.q.hook_out": "attn.hook_q",
    "attn.k.hook_out": "attn.hook_k",
    "attn.v.hook_out": "attn.hook_v",
    "attn.o.hook_in": "attn.hook_z",
    "attn.o.hook_out": "hook_attn_out",
    "mlp.in.hook_out": "mlp.hook_pre",
    "mlp.out.hook_in": "mlp.hook_post",
    "mlp.out.hook_out": "hook_mlp_out",
    "mlp.hook_out": "hook_mlp_out",
}
# The same where the MLP has a gate, where norms come after the sublayers too, and where they come after them alone.
BRIDGE_GATED: Mapping[str, str] = {"mlp.gate.hook_out": "mlp.hook_pre", "mlp.in.hook_out": "mlp.hook_pre_linear"}
BRIDGE_POST_NORMS: Mapping[str, str] = {"ln1_post.hook_out": "hook_attn_out", "ln2_post.hook_out": "hook_mlp_out"}
BRIDGE_LATE_NORMS: Mapping[str, str] = {
    **BRIDGE_POST_NORMS,
    "mlp.hook_in": "hook_resid_mid",
    "ln1_post.hook_scale": "ln1.hook_scale",
    "ln1_post.hook_normalized": "ln1.hook_normalized",
    "ln2_post.hook_scale": "ln2.hook_scale",
    "ln2_post.hook_normalized": "ln2.hook_normalized",
}
# And where they normalise the residual stream itself.
BRIDGE_RESIDUAL_NORMS: Mapping[str, str] = {
    "hook_out": "hook_normalized_resid_post",
    "ln1.hook_in": "hook_resid_mid",
    "ln2.hook_in": "hook_resid_post",
    "ln2.hook_out": "hook_normalized_resid_post",
}
# What a sublayer gives before such a norm, which is no hook point.
BEFORE_POST_NORMS = frozenset({"attn.hook_out", "attn.o.hook_out", "mlp.out.hook_out", "mlp.hook_out"})
BRIDGE: Mapping[str, str] = {
    "embed.hook_out": "hook_embed",
    "pos_embed.hook_out": "hook_pos_embed",
    "ln_final.hook_out": "unembed.hook_in",
    "hook_unembed": "unembed.hook_out",
}
