"""What a sweep measures of the logits: metrics as data, which say which positions and tokens they need."""

from __future__ import annotations

from graphlens.analysis.metrics import (
    CrossEntropy,
    KLDivergence,
    LogitDiff,
    Metric,
    Needs,
    Probability,
    normalised,
)

__all__ = ["CrossEntropy", "KLDivergence", "LogitDiff", "Metric", "Needs", "Probability", "normalised"]
