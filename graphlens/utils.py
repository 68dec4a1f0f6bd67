"""The helpers of ``transformer_lens.utils`` and of its analysis modules, in one place. No torch needed."""

from __future__ import annotations

from graphlens.analysis.factored_matrix import FactoredMatrix, composition_scores
from graphlens.analysis.numerics import lm_accuracy, lm_cross_entropy_loss
from graphlens.analysis.slices import Slice
from graphlens.experiments.heads import (
    HEAD_NAMES,
    compute_head_attention_similarity_score,
    detect_head,
    get_duplicate_token_head_detection_pattern,
    get_induction_head_detection_pattern,
    get_previous_token_head_detection_pattern,
    get_supported_heads,
)
from graphlens.experiments.induction import induction_loss
from graphlens.file.names import get_act_name
from graphlens.model.methods.text import test_prompt

__all__ = [
    "HEAD_NAMES",
    "FactoredMatrix",
    "Slice",
    "composition_scores",
    "compute_head_attention_similarity_score",
    "detect_head",
    "get_act_name",
    "get_duplicate_token_head_detection_pattern",
    "get_induction_head_detection_pattern",
    "get_previous_token_head_detection_pattern",
    "get_supported_heads",
    "induction_loss",
    "lm_accuracy",
    "lm_cross_entropy_loss",
    "test_prompt",
]
