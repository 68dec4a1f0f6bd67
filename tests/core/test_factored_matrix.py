"""Factored matrices: each is the product of its factors, and composition scores are ratios of their norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from graphlens import utils
from graphlens.errors import InputError
from graphlens.utils import FactoredMatrix
from tests.closeness import close


@pytest.mark.parametrize(
    ("left", "right"),
    [((7, 3), (3, 5)), ((2, 4, 7, 3), (2, 4, 3, 7)), ((4, 3, 9), (2, 1, 9, 5)), ((6, 8), (8, 6))],
)
def test_factored_matrices_are_their_products(left: Any, right: Any) -> None:
    draw = np.random.default_rng(3)
    a, b = draw.normal(size=left), draw.normal(size=right)
    factored, dense = FactoredMatrix(a, b), a @ b
    rows, columns = dense.shape[-2:]
    assert (factored.shape, factored.ndim, factored.has_leading_dims) == (dense.shape, dense.ndim, dense.ndim > 2)
    assert (factored.ldim, factored.mdim, factored.rdim) == (rows, left[-1], columns)
    close(factored.AB, dense)
    close(factored.T.AB, np.swapaxes(dense, -1, -2))
    close(factored.norm(), np.sqrt((dense**2).sum((-1, -2))))
    close((2 * factored * np.float64(3)).AB, 6 * dense)
    close(factored.pair[0] @ factored.pair[1], dense)

    for wide in (2, 20):
        matrix, other = draw.normal(size=(columns, wide)), draw.normal(size=(wide, rows))
        close((factored @ matrix).AB, dense @ matrix)
        close((other @ factored).AB, other @ dense)
        both = FactoredMatrix(draw.normal(size=(columns, 2)), draw.normal(size=(2, wide)))
        close((factored @ both).AB, dense @ both.AB)
    vector, row = draw.normal(size=columns), draw.normal(size=rows)
    close(factored @ vector, dense @ vector)
    close(row @ factored, row @ dense)

    u, s, v = factored.svd()
    kept = min(rows, left[-1], columns)
    assert (u.shape[-1], s.shape[-1], v.shape[-1]) == (kept, kept, kept)
    close((u * s[..., None, :]) @ np.swapaxes(v, -1, -2), dense)
    close(s, np.linalg.svd(dense, compute_uv=False)[..., :kept])
    close(np.swapaxes(factored.U, -1, -2) @ factored.U, np.broadcast_to(np.eye(kept), (*dense.shape[:-2], kept, kept)))
    close(factored.make_even().AB, dense)
    close(factored.U @ factored.collapse_l(), dense)
    close(factored.collapse_r() @ np.swapaxes(factored.V, -1, -2), dense)
    close(factored.get_corner(2), dense[(slice(2),) * dense.ndim])
    with pytest.warns(DeprecationWarning, match="write V"):
        assert factored.Vh is factored.V
    if rows == columns:
        found = factored.eigenvalues
        assert np.iscomplexobj(found)
        close(found.sum(-1).real, np.trace(dense, axis1=-2, axis2=-1))
        close(factored.BA, b @ a)
    else:
        for ask in (lambda: factored.BA, lambda: factored.eigenvalues):
            with pytest.raises(InputError, match="square"):
                ask()


def test_indexing_a_factored_matrix() -> None:
    draw = np.random.default_rng(4)
    a, b = draw.normal(size=(2, 4, 7, 3)), draw.normal(size=(2, 4, 3, 5))
    factored, dense = FactoredMatrix(a, b), a @ b
    for index, expected in (
        (1, dense[1]),
        ((1, -1), dense[1, -1]),
        ((slice(None), [0, 2]), dense[:, [0, 2]]),
        ((None, 1), dense[None, 1]),
        ((0, 1, -1), dense[0, 1, -1:]),
        ((0, 1, 2, -1), dense[0, 1, 2:3, -1:]),
        ((..., slice(2), [4, 0]), dense[..., :2, :][..., [4, 0]]),
        ((0, ..., 3), dense[0, ..., 3:4]),
        (([0, 1], [1, 2], slice(1, 3)), dense[[0, 1], [1, 2], 1:3]),
    ):
        close(factored[index].AB, expected)
    assert factored.unsqueeze(1).shape == (2, 1, 4, 7, 5)
    assert [part.shape for part in factored] == [(4, 7, 5)] * 2
    for wrong in ((0, 0, 0, 0, 0), (5,), (0, 0, 7), (0, 0, 0, -6)):
        with pytest.raises(InputError):
            factored[wrong]
    with pytest.raises(InputError, match="leading"):
        factored.unsqueeze(4)


@st.composite
def axis_index(draw: Callable[..., Any], size: int) -> Any:
    """An index of one axis: every form that NumPy takes along one, as NumPy's own object."""
    form = draw(st.sampled_from(["int", "NumPy int", "slice", "list", "array", "mask", "range", "one", "none of them"]))
    place = st.integers(-size, size - 1)
    if form in ("int", "NumPy int"):
        return draw(place) if form == "int" else np.int16(draw(place))
    if form == "slice":
        ends = st.none() | st.integers(-size - 2, size + 2)
        return slice(draw(ends), draw(ends), draw(st.sampled_from([None, 1, 2, -1, -2])))
    if form == "range":
        return range(draw(st.integers(0, size - 1)), size)
    if form == "mask":
        return np.asarray(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    if form == "none of them":
        return []
    listed = draw(st.lists(place, min_size=1, max_size=1 if form == "one" else 4))
    return np.asarray(listed) if draw(st.booleans()) else listed


@st.composite
def indices(draw: Callable[..., Any], shape: tuple[int, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...], list[Any]]:
    """(an index of a factored matrix, its leading part, that of rows and of columns)."""
    leading: list[Any] = []
    place = 0
    while place < len(shape) - 2:
        form = draw(st.sampled_from(["one axis", "one axis", "new", "mask of all", "bool"]))
        if form == "mask of all" and place == 0:
            leading.append(np.asarray(draw(st.lists(st.booleans(), min_size=6, max_size=6))).reshape(shape[:2]))
            place = 2
        elif form == "new":
            leading.append(None)
        elif form == "bool" and not any(item is True for item in leading):
            leading.append(True)
        else:
            leading.append(draw(axis_index(shape[place])))
            place += 1
    matrix = [draw(axis_index(size)) for size in shape[-2:]][: draw(st.integers(0, 2))]
    index = [*leading, *matrix]
    if not matrix and draw(st.booleans()):
        index.append(...)
    whole = [*matrix, *[slice(None)] * (2 - len(matrix))]
    return tuple(index), tuple(leading), whole


@settings(max_examples=300, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(st.data())
def test_every_form_of_index_is_numpy_s_axis_by_axis(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(2, 3, 5, 4), (5, 4)]))
    draw = np.random.default_rng(5)
    a, b = draw.normal(size=(*shape[:-1], 3)), draw.normal(size=(*shape[:-2], 3, shape[-1]))
    index, leading, (rows, columns) = data.draw(indices(shape))

    def kept(item: Any) -> Any:
        """An integer as a list of one: of rows and of columns it keeps the axis."""
        return [item] if isinstance(item, int | np.integer) else np.asarray(item, int) if item == [] else item

    try:
        part = (a @ b)[leading]
    except IndexError:  # of arrays that NumPy cannot pair
        with pytest.raises(InputError):
            FactoredMatrix(a, b)[index]
        return
    rows, columns = (kept(item) if not isinstance(item, np.ndarray) else item for item in (rows, columns))
    expected = part[..., rows, :][..., columns]
    found = FactoredMatrix(a, b)[index if len(index) != 1 or data.draw(st.booleans()) else index[0]]
    assert found.AB.shape == expected.shape
    np.testing.assert_allclose(found.AB, expected, atol=1e-12)
    np.testing.assert_array_equal(found.A, a[leading][..., rows, :])  # no other factors that give the same


def test_one_listed_index_keeps_its_axis() -> None:
    a, b = np.random.default_rng(6).normal(size=(2, 5, 3)), np.random.default_rng(7).normal(size=(2, 3, 4))
    for one in ([1], np.asarray([1]), (1,), range(1, 2), np.asarray([False, True, False, False])):
        found = FactoredMatrix(a, b)[:, :, one]
        np.testing.assert_allclose(found.AB, (a @ b)[:, :, [1]], atol=1e-12)
    assert FactoredMatrix(a, b)[[1]].shape == (1, 5, 4)
    assert FactoredMatrix(a, b)[np.asarray(1)].shape == (5, 4)


@pytest.mark.parametrize(
    "index",
    [1.0, "1", (0, 1.5), (0, [0.5]), (..., ...), (0, 0, None), (0, [[0, 1]]), (slice(1.5),), (0, 1j), ([0, 2],), (0, 0, True),
     (0, 0, 0, ...,  0), (np.ones((2, 5), bool),), ([True] * 3,)],
    ids=repr,
)  # fmt: skip
def test_an_index_of_another_form_is_refused(index: Any) -> None:
    with pytest.raises(InputError):
        FactoredMatrix(np.ones((2, 5, 3)), np.ones((2, 3, 4)))[index]


def test_factored_matrices_refuse_what_does_not_fit() -> None:
    matrix = FactoredMatrix(np.ones((7, 3), np.float16), np.ones((3, 5)))
    assert matrix.A.dtype == np.float32
    for wrong in (
        lambda: FactoredMatrix(np.ones((7, 3)), np.ones((4, 5))),
        lambda: FactoredMatrix(np.ones(3), np.ones((3, 5))),
        lambda: FactoredMatrix(np.ones((2, 7, 3)), np.ones((4, 3, 5))),
        lambda: matrix @ np.ones((4, 5)),
        lambda: matrix @ np.ones(7),
        lambda: np.ones((2, 5)) @ matrix,
        lambda: matrix * np.ones(2),
        lambda: utils.composition_scores(matrix, matrix),
    ):
        with pytest.raises(InputError):
            wrong()


def test_composition_scores_are_the_norms_ratio() -> None:
    draw = np.random.default_rng(5)
    left = FactoredMatrix(draw.normal(size=(2, 4, 9, 3)), draw.normal(size=(2, 4, 3, 9)))
    right = FactoredMatrix(draw.normal(size=(3, 9, 2)), draw.normal(size=(3, 2, 6)))
    product = left.AB[:, :, None] @ right.AB
    norms = [np.linalg.norm(matrix, axis=(-2, -1)) for matrix in (product, left.AB, right.AB)]
    scores = utils.composition_scores(left, right)
    close(scores, norms[0] / norms[1][..., None] / norms[2])
    paired = utils.composition_scores(left, right[0], broadcast_dims=False)
    close(paired, scores[..., 0])
