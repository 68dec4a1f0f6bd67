"""The helpers of ``transformer_lens.utils`` that need no torch, and of its analysis modules, in one place.

``graphlens.transformer_lens.utils`` has all of them, for tensors.
"""

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
from graphlens.lens.defaults import (
    USE_DEFAULT_VALUE,
    LocallyOverridenDefaults,
    override_or_use_default_value,
)
from graphlens.lens.svd_interpreter import SVDInterpreter
from graphlens.lens.tensors import (
    check_structure,
    filter_dict_by_prefix,
    get_corner,
    get_cumsum_along_dim,
    get_matrix_corner,
    get_nested_attr,
    get_offset_position_ids,
    is_library_available,
    is_lower_triangular,
    is_square,
    remove_batch_dim,
    repeat_along_head_dimension,
    set_nested_attr,
    to_numpy,
    transpose,
)
from graphlens.model.methods.text import test_prompt
from graphlens.model.sampling import sample_logits

__all__ = [
    "HEAD_NAMES",
    "USE_DEFAULT_VALUE",
    "FactoredMatrix",
    "LocallyOverridenDefaults",
    "SVDInterpreter",
    "Slice",
    "check_structure",
    "composition_scores",
    "compute_head_attention_similarity_score",
    "detect_head",
    "filter_dict_by_prefix",
    "get_act_name",
    "get_corner",
    "get_cumsum_along_dim",
    "get_duplicate_token_head_detection_pattern",
    "get_induction_head_detection_pattern",
    "get_matrix_corner",
    "get_nested_attr",
    "get_offset_position_ids",
    "get_previous_token_head_detection_pattern",
    "get_supported_heads",
    "induction_loss",
    "is_library_available",
    "is_lower_triangular",
    "is_square",
    "lm_accuracy",
    "lm_cross_entropy_loss",
    "override_or_use_default_value",
    "remove_batch_dim",
    "repeat_along_head_dimension",
    "sample_logits",
    "set_nested_attr",
    "test_prompt",
    "to_numpy",
    "transpose",
]
