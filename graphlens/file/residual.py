"""What the residual stream of a block is the sum of, for every architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphlens.file.manifest import ModelConfig


def sums_in_block(config: ModelConfig) -> dict[str, list[str]]:
    """The hook points of a block's residual stream that are sums -> what each is the sum of, all without the block.

    Args:
        config: The model's architecture.
    """
    pre, mid, post = "hook_resid_pre", "hook_resid_mid", "hook_resid_post"
    attention, mlp = "hook_attn_out", "hook_mlp_out"
    if config.parallel_attn_mlp:
        return {post: [pre, attention, mlp]}
    if config.normalises_residual:  # what the MLP's output is added to is normalised, and no hook point
        return {mid: [pre, attention]}
    if config.attn_only:
        return {post: [pre, attention]}
    return {mid: [pre, attention], post: [mid, mlp]}
