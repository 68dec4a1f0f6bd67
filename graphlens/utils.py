"""The helpers of ``transformer_lens.utils`` and of its analysis modules, in one place. No torch needed."""

# ruff: noqa: PT028  # test_prompt is no test

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphlens.analysis.factored_matrix import FactoredMatrix
from graphlens.analysis.head_detector import detect_head
from graphlens.analysis.induction import induction_loss
from graphlens.analysis.numerics import composition_scores, lm_accuracy, lm_cross_entropy_loss
from graphlens.analysis.slices import Slice
from graphlens.hook_points import get_act_name

__all__ = [
    "FactoredMatrix",
    "Slice",
    "composition_scores",
    "detect_head",
    "get_act_name",
    "induction_loss",
    "lm_accuracy",
    "lm_cross_entropy_loss",
    "test_prompt",
]


def test_prompt(
    prompt: str,
    answer: str | Sequence[str],
    model: Any,
    prepend_space_to_answer: bool = True,
    print_details: bool = True,
    prepend_bos: bool | None = None,
    top_k: int = 10,
) -> None:
    """Prints how well ``model`` completes ``prompt``: ``model.test_prompt``, with TransformerLens's arguments."""
    model.test_prompt(prompt, answer, prepend_space_to_answer, print_details, prepend_bos, top_k)


test_prompt.__test__ = False  # type: ignore[attr-defined]  # or pytest takes it for a test where it is imported
