"""Attribution: estimates of patches and of edges from gradients, circuits, and what components write to the logits."""

from __future__ import annotations

from graphlens.analysis.compare import Comparison, circuit, compare_with_sweep
from graphlens.analysis.feature_scores import FeatureCircuit, FeatureScores
from graphlens.experiments.attribution import attribution_patch, direct_logit_attribution
from graphlens.experiments.circuits import edge_attribution, faithfulness
from graphlens.experiments.feature_circuits import circuit_curves, feature_scores
from graphlens.experiments.sae_attribution import feature_attribution

__all__ = [
    "Comparison",
    "FeatureCircuit",
    "FeatureScores",
    "attribution_patch",
    "circuit",
    "circuit_curves",
    "compare_with_sweep",
    "direct_logit_attribution",
    "edge_attribution",
    "faithfulness",
    "feature_attribution",
    "feature_scores",
]
