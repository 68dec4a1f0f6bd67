"""What a static quantiser leaves of an activation: to half a step of its range, and no more is forgiven."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from graphlens.analysis.identity_rounding import ALLOWED, rounding

X = np.random.default_rng(2).normal(0, 1, (3, 5, 7)).astype(np.float32)
STEP, ZERO = np.asarray(0.02), np.asarray(110.0)
HOOK = "blocks.2.attn.hook_q"


def integers(x: npt.NDArray[Any], step: npt.NDArray[Any] = STEP) -> npt.NDArray[np.uint8]:
    """What QuantizeLinear gives, by its definition."""
    return np.clip(np.round(x / step) + ZERO, 0, 255).astype(np.uint8)


def test_rounding_holds_to_half_a_step() -> None:
    found = rounding(HOOK, X, integers(X), STEP, ZERO)
    assert found is not None
    assert found.passed
    assert found.residual <= 1e-6
    assert found.hooks == (HOOK,)
    assert found.layer == 2
    assert "attn.hook_q" in found.name


def test_a_step_of_each_channel() -> None:
    steps = np.linspace(0.02, 0.05, 7)
    found = rounding(HOOK, X, integers(X, steps), steps, ZERO, axis=-1)
    assert found is not None
    assert found.passed
    wrong = rounding(HOOK, X, integers(X, steps), steps[::-1], ZERO, axis=-1)
    assert wrong is not None
    assert not wrong.passed


def test_what_saturates_is_left_out() -> None:
    wide = X * 20
    found = rounding(HOOK, wide, integers(wide), STEP, ZERO)
    assert found is not None
    assert found.passed
    assert rounding(HOOK, X + 1000, integers(X + 1000), STEP, ZERO) is None


def test_padding_may_hold_no_numbers() -> None:
    some = X.copy()
    some[0, 0] = np.nan
    found = rounding(HOOK, some, np.where(np.isnan(some), 7, integers(X)).astype(np.uint8), STEP, ZERO)
    assert found is not None
    assert found.passed


@pytest.mark.parametrize("wrong", ["other", "one more", "scale", "zero point"])
def test_what_is_no_rounding_fails(wrong: str) -> None:
    given = {"other": X[::-1], "one more": X + np.float32(0.02)}.get(wrong, X)
    step = STEP * 1.01 if wrong == "scale" else STEP
    found = rounding(HOOK, given, integers(X), step, ZERO + (wrong == "zero point"))
    assert found is not None
    assert not found.passed
    assert found.residual > 10 * ALLOWED


def test_integers_that_numpy_lacks_tell_nothing() -> None:
    assert rounding(HOOK, X, X, STEP, ZERO) is None
