"""Attribution: estimates of patches and of edges from gradients, circuits, and what components write to the logits."""

from __future__ import annotations

from graphlens.analysis.compare import Comparison, circuit, compare_with_sweep
from graphlens.experiments.attribution import attribution_patch, direct_logit_attribution
from graphlens.experiments.circuits import edge_attribution, faithfulness
from graphlens.experiments.pairs import attribution_pairs

__all__ = [
    "Comparison",
    "attribution_pairs",
    "attribution_patch",
    "circuit",
    "compare_with_sweep",
    "direct_logit_attribution",
    "edge_attribution",
    "faithfulness",
]
