"""Attribution: estimates of patches and edges from gradients, circuits, attribution graphs, what components write to logits."""

from __future__ import annotations

from graphlens.analysis.attribution_graph import AttributionGraph, GraphNode
from graphlens.analysis.compare import Comparison, circuit, compare_with_sweep
from graphlens.analysis.feature_scores import FeatureCircuit, FeatureScores
from graphlens.experiments.attribution import attribution_patch, direct_logit_attribution
from graphlens.experiments.attribution_graph import attribution_graph
from graphlens.experiments.circuits import edge_attribution, faithfulness
from graphlens.experiments.feature_circuits import circuit_curves, feature_scores
from graphlens.experiments.pairs import attribution_pairs
from graphlens.experiments.sae_attribution import feature_attribution

__all__ = [
    "AttributionGraph",
    "Comparison",
    "FeatureCircuit",
    "FeatureScores",
    "GraphNode",
    "attribution_graph",
    "attribution_pairs",
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
