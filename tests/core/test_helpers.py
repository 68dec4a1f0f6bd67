"""TransformerLens's helpers that need no torch, on arrays. tests/parity/test_lens_helpers.py compares them with its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import graphlens
from graphlens import GraphlensError, utils

X = np.random.default_rng(0).normal(size=(3, 5, 7))
MASK = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 0, 1]])


def test_every_name_is_there() -> None:
    assert all(hasattr(utils, name) for name in utils.__all__)


def test_arrays_stay_arrays() -> None:
    assert utils.to_numpy(X) is X
    np.testing.assert_array_equal(utils.to_numpy([[1, 2], [3, 4]]), [[1, 2], [3, 4]])
    np.testing.assert_array_equal(utils.get_corner(X, 2), X[:2, :2, :2])
    np.testing.assert_array_equal(utils.transpose(X), np.swapaxes(X, 1, 2))
    np.testing.assert_array_equal(utils.remove_batch_dim(X[:1]), X[0])
    assert utils.remove_batch_dim(X) is X
    with pytest.raises(TypeError):
        utils.to_numpy({1})


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_a_sum_from_the_end_is_the_rest_of_the_sum(dim: int) -> None:
    forward, backward = (utils.get_cumsum_along_dim(X, dim, reverse) for reverse in (False, True))
    np.testing.assert_allclose(forward + backward - X, np.broadcast_to(X.sum(dim, keepdims=True), X.shape))


def test_positions_begin_at_the_first_token() -> None:
    np.testing.assert_array_equal(
        utils.get_offset_position_ids(0, MASK), [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 1, 1, 2]]
    )
    np.testing.assert_array_equal(utils.get_offset_position_ids(3, MASK), [[1, 2], [3, 4], [1, 2]])


def test_heads_are_copies_unless_told() -> None:
    view, copy = (utils.repeat_along_head_dimension(X, 4, clone) for clone in (False, True))
    assert view.shape == copy.shape == (3, 5, 4, 7)
    assert np.shares_memory(view, X)
    assert not np.shares_memory(copy, X)
    np.testing.assert_array_equal(copy, np.stack([X] * 4, 2))


def test_matrices_are_told_apart() -> None:
    square = X[0, :, :5]
    assert utils.is_square(square)
    assert not utils.is_square(X)
    assert not utils.is_lower_triangular(square)
    assert utils.is_lower_triangular(np.tril(square))
    assert not utils.is_lower_triangular(np.tril(X[0]))
    with pytest.raises(GraphlensError, match="two matrices of one shape"):
        utils.check_structure(square, X[0])


@pytest.mark.parametrize(("one", "said"), [(X[0], "PASSED"), (-X[0], "row mismatch: [0, 1, 2, 3]")])
def test_structures_are_told_apart(one: Any, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    utils.check_structure(X[0], one)
    assert capsys.readouterr().out.strip() == said


def test_other_defaults_hold_in_their_block(tiny: graphlens.HookedTransformer) -> None:
    before = tiny.to_tokens("When John")
    with utils.LocallyOverridenDefaults(tiny, prepend_bos=False, padding_side="left"):
        np.testing.assert_array_equal(tiny.to_tokens("When John"), before[:, 1:])
        padded = tiny.to_tokens(["When", "When John and"])
        assert tiny.cfg.default_padding_side == "left"
    assert padded[0, 0] == padded[0, 1]
    assert padded[0, -1] == before[0, 1]
    np.testing.assert_array_equal(tiny.to_tokens("When John"), before)
    with pytest.raises(ZeroDivisionError), utils.LocallyOverridenDefaults(tiny, prepend_bos=False):
        _ = 1 / 0
    np.testing.assert_array_equal(tiny.to_tokens("When John"), before)


@pytest.mark.parametrize("overrides", [{"padding_side": "up"}, {"prepend_bos": "left"}, {"temperature": 1}])
def test_defaults_that_cannot_be_are_refused(overrides: dict[str, Any], tiny: graphlens.HookedTransformer) -> None:
    with pytest.raises(GraphlensError):
        utils.LocallyOverridenDefaults(tiny, **overrides)
