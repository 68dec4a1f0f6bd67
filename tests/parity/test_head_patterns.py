"""The head detector's patterns, score and refusals, beside TransformerLens 3.9."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformer_lens import head_detector

from graphlens import utils
from graphlens.errors import InputError
from graphlens.torch import HookedTransformer
from tests.closeness import close

PROMPT = "John and Mary and John and Mary and"
PATTERNS = [name for name in dir(head_detector) if name.endswith("_detection_pattern")]
DRAW = np.random.default_rng(0)
LENGTH = 6
ATTENTION = np.tril(DRAW.random((LENGTH, LENGTH))).astype(np.float32)
ATTENTION /= ATTENTION.sum(-1, keepdims=True)


def test_every_function_is_there_with_its_arguments() -> None:
    assert len(PATTERNS) == 3
    for name in ("detect_head", "get_supported_heads", "compute_head_attention_similarity_score", *PATTERNS):
        mine, theirs = (inspect.signature(getattr(module, name)).parameters for module in (utils, head_detector))
        assert [(p.name, p.default, p.kind) for p in mine.values()] == [
            (p.name, p.default, p.kind) for p in theirs.values()
        ]
    assert utils.HEAD_NAMES == head_detector.HEAD_NAMES


def test_the_names_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    head_detector.get_supported_heads()
    expected = capsys.readouterr().out
    assert utils.get_supported_heads() is None
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("shape", [(1, 9), (9,), (1, 2), (1, 1)])
def test_patterns_of_tokens(name: str, shape: tuple[int, ...]) -> None:
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 3, shape))  # of three tokens many come again
    before = tokens.clone()
    expected = getattr(head_detector, name)(tokens)
    found = getattr(utils, name)(tokens)
    assert isinstance(found, torch.Tensor)
    close(found, expected)
    close(getattr(utils, name)(tokens.numpy()), expected)
    assert torch.equal(tokens, before)
    if shape == (1, 9) and "previous" not in name:
        assert 0 < expected.sum() < expected.numel() / 2
    with pytest.raises(InputError, match="of one prompt"):
        getattr(utils, name)(torch.zeros(2, 4, dtype=torch.int64))


@pytest.mark.parametrize("error_measure", ["mul", "abs"])
@pytest.mark.parametrize("exclude_bos", [False, True])
@pytest.mark.parametrize("exclude_current_token", [False, True])
@pytest.mark.parametrize("expected_attention", ["ones and zeros", "numbers"])
def test_the_score_of_a_pattern(
    error_measure: Any, exclude_bos: bool, exclude_current_token: bool, expected_attention: str
) -> None:
    draw = np.random.default_rng(2)
    wanted = (
        draw.integers(0, 2, ATTENTION.shape) if expected_attention == "ones and zeros" else draw.random(ATTENTION.shape)
    )
    pattern = torch.from_numpy(np.tril(wanted).astype(np.float32))
    options = {
        "exclude_bos": exclude_bos,
        "exclude_current_token": exclude_current_token,
        "error_measure": error_measure,
    }
    theirs = head_detector.compute_head_attention_similarity_score(
        torch.from_numpy(ATTENTION.copy()), pattern, **options
    )
    for attention, wanted_there in ((ATTENTION, pattern.numpy()), (torch.from_numpy(ATTENTION), pattern)):
        found = utils.compute_head_attention_similarity_score(attention, wanted_there, **options)
        assert type(found) is type(theirs) is float
        assert abs(found - theirs) <= (1.1e-3 if error_measure == "abs" else 5e-6)
    np.testing.assert_allclose(ATTENTION.sum(-1), 1, atol=1e-6)  # it stayed as it was


def test_a_score_of_no_attention_is_nan_in_both() -> None:
    options: dict[str, Any] = {"exclude_bos": True, "exclude_current_token": True, "error_measure": "mul"}
    attention, pattern = torch.eye(3), torch.ones(3, 3).tril()
    assert math.isnan(head_detector.compute_head_attention_similarity_score(attention, pattern, **options))
    assert math.isnan(utils.compute_head_attention_similarity_score(attention, pattern, **options))


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda m: utils.detect_head(m, PROMPT, "test"), "no known head"),
        (lambda m: utils.detect_head(m, PROMPT, "induction_head", error_measure="sum"), "error_measure"),
        (lambda m: utils.detect_head(m, "", "previous_token_head"), "1 tokens"),
        (lambda m: utils.detect_head(m, "a " * m.cfg.n_ctx, "previous_token_head"), "n_ctx"),
        (lambda m: utils.detect_head(m, PROMPT, torch.ones(4, 4)), "lower triangular"),
        (lambda m: utils.detect_head(m, PROMPT, np.ones((9, 9))), "lower triangular"),
        (lambda m: utils.detect_head(m, [PROMPT], "induction_head", cache={}), "one prompt"),
        (lambda m: utils.detect_head(m, PROMPT, "induction_head", heads=[(0, 9)]), "no head 9"),
        (lambda m: score(np.ones((2, 3)), np.ones((2, 3)), "mul"), "same square"),
        (lambda m: score(np.ones((3, 3)), np.eye(4), "mul"), "same square"),
        (lambda m: score(np.eye(3), np.ones((3, 3)), "abs"), "lower triangular"),
        (lambda m: score(np.eye(3), np.eye(3), "sum"), "error_measure"),
    ],
)
def test_what_cannot_be_compared_is_refused(model: HookedTransformer, ask: Callable[[Any], Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        ask(model)


def score(attention: np.ndarray, pattern: np.ndarray, error_measure: str) -> float:
    return utils.compute_head_attention_similarity_score(
        attention, pattern, exclude_bos=False, exclude_current_token=False, error_measure=error_measure
    )


def test_a_pattern_of_ones_own_over_several_prompts_is_their_mean(model: HookedTransformer, lens: Any) -> None:
    prompts = [PROMPT, "Mary and John and Mary and John and"]
    length = model.to_tokens(PROMPT).shape[1]
    pattern = torch.ones(length, length).tril(-1)
    each = [head_detector.detect_head(lens, prompt, pattern) for prompt in prompts]
    assert (each[0] - each[1]).abs().max() > 1e-3
    close(utils.detect_head(model, prompts, pattern), torch.stack(each).mean(0))
