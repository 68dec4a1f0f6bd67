"""Attribution: estimates of patches and of edges from gradients, circuits, and what components write to the logits."""

from __future__ import annotations

from graphlens.analysis.attribution import (
    Comparison,
    attribution_patch,
    circuit,
    compare_with_sweep,
    direct_logit_attribution,
    edge_attribution,
    faithfulness,
)

__all__ = [
    "Comparison",
    "attribution_patch",
    "circuit",
    "compare_with_sweep",
    "direct_logit_attribution",
    "edge_attribution",
    "faithfulness",
]
