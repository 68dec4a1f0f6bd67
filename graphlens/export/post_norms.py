"""Blocks whose norms come after the sublayers, and normalise the residual stream itself (BERT, OPT-350m)."""

from __future__ import annotations

from torch import Tensor, nn

from graphlens.export.decoder import Block, Inputs


class PostNormBlock(Block):
    """A block whose norms come after the sublayers, and normalise the residual stream with what they added to it."""

    def forward(self, resid: Tensor, inputs: Inputs, model: nn.Module) -> Tensor:
        """The residual stream [b, p, d_model] after the block, normalised."""
        resid = self._mark(resid, "hook_resid_pre")
        middle = self._mark(resid + self._mark(self._attend(resid, inputs, model), "hook_attn_out"), "hook_resid_mid")
        middle = self._norm(self.spec.ln1, "ln1", middle)
        after = self._mark(middle + self._mark(self._feed(middle), "hook_mlp_out"), "hook_resid_post")
        return self._mark(self._norm(self.spec.ln2, "ln2", after), "hook_normalized_resid_post")
