"""FactoredMatrix on both faces, beside TransformerLens 3.9: every member, product and index, dtypes and gradients."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformer_lens

import graphlens
import graphlens.torch
from graphlens.errors import InputError

Theirs = transformer_lens.FactoredMatrix
FACES: dict[str, Any] = {"arrays": graphlens.FactoredMatrix, "tensors": graphlens.torch.FactoredMatrix}
SHAPES = [((5, 3), (3, 7)), ((4, 5, 3), (3, 5)), ((5, 3), (2, 4, 3, 5)), ((2, 1, 6, 8), (4, 8, 6)), ((1, 1), (1, 1))]
MEMBERS = [name for name in dir(Theirs) if not name.startswith("_")]


@pytest.fixture(params=FACES)
def face(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng((seed, *shape)).normal(size=shape)).to(dtype)


def given(face: str, value: Any) -> Any:
    return value.numpy() if face == "arrays" and isinstance(value, torch.Tensor) else value


def pair(face: str, left: torch.Tensor, right: torch.Tensor) -> tuple[Any, Any]:
    """(ours, TransformerLens's) of the same factors."""
    return FACES[face](given(face, left), given(face, right)), Theirs(left, right)


def alike(face: str, found: Any, expected: Any) -> None:
    if isinstance(expected, Theirs):
        assert type(found) is FACES[face]
        assert tuple(found.shape) == tuple(expected.shape)
        assert (found.ldim, found.mdim, found.rdim) == (expected.ldim, expected.mdim, expected.rdim)
        alike(face, found.A, expected.A)
        alike(face, found.B, expected.B)
    elif isinstance(expected, tuple) and not isinstance(expected, torch.Size):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            alike(face, one, other)
    elif isinstance(expected, torch.Tensor):
        assert isinstance(found, np.ndarray if face == "arrays" else torch.Tensor)
        assert found.shape == tuple(expected.shape)
        np.testing.assert_allclose(np.asarray(found), expected.numpy(), atol=1e-9)
        assert np.asarray(found).dtype == expected.numpy().dtype
    else:
        assert found == expected


def test_every_member_is_there_with_its_arguments(face: str) -> None:
    for name in [*MEMBERS, "__matmul__", "__rmatmul__", "__mul__", "__rmul__", "__getitem__"]:
        theirs, mine = inspect.getattr_static(Theirs, name), inspect.getattr_static(FACES[face], name)
        assert mine.__doc__ or getattr(mine, "func", mine).__doc__, name
        if callable(theirs):
            found, expected = (inspect.signature(kind).parameters for kind in (mine, theirs))
            assert list(found) == list(expected), name
            assert [p.default for p in found.values()] == [p.default for p in expected.values()], name
    instance = Theirs(drawn(2, 3), drawn(3, 4))
    assert set(vars(instance)) <= set(vars(FACES[face](given(face, drawn(2, 3)), given(face, drawn(3, 4)))))
    assert issubclass(graphlens.torch.FactoredMatrix, graphlens.FactoredMatrix)


@pytest.mark.parametrize(("left", "right"), SHAPES)
def test_members_and_products(face: str, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    mine, theirs = pair(face, drawn(*left), drawn(*right, seed=1))
    for name in ("A", "B", "AB", "T", "S", "ldim", "mdim", "rdim", "ndim", "has_leading_dims", "pair"):
        alike(face, getattr(mine, name), getattr(theirs, name))
    assert isinstance(mine.shape, tuple if face == "arrays" else torch.Size)
    for name, args in (("norm", ()), ("get_corner", ()), ("get_corner", (2,)), ("unsqueeze", (0,))):
        alike(face, getattr(mine, name)(*args), getattr(theirs, name)(*args))
    if theirs.ldim == theirs.rdim:
        alike(face, mine.BA, theirs.BA)
        found, expected = (np.sort_complex(np.asarray(kind.eigenvalues)) for kind in (mine, theirs))
        np.testing.assert_allclose(np.sort(np.abs(found)), np.sort(np.abs(expected)), atol=1e-9)
        assert found.dtype == expected.dtype
    dense = theirs.AB
    u, s, v = mine.svd()
    np.testing.assert_allclose(np.asarray(u * s[..., None, :]) @ np.asarray(v).swapaxes(-1, -2), dense, atol=1e-9)
    assert [tuple(part.shape) for part in (u, s, v)] == [tuple(part.shape) for part in theirs.svd()]
    for first, second in zip(mine.svd(), (mine.U, mine.S, mine.V), strict=True):
        assert first is second  # computed once
    with pytest.warns(DeprecationWarning, match="write V"):
        assert mine.Vh is mine.V
    np.testing.assert_allclose(np.asarray(mine.make_even().AB), dense, atol=1e-9)
    # Singular vectors have no sign of their own.
    for name in ("collapse_l", "collapse_r"):
        np.testing.assert_allclose(np.abs(np.asarray(getattr(mine, name)())), getattr(theirs, name)().abs(), atol=1e-8)

    for width in (2, 9):
        for axes in ((), (4,), (2, 4)):
            matrix, other = drawn(*axes, theirs.rdim, width), drawn(*axes, width, theirs.ldim)
            alike(face, mine @ given(face, matrix), theirs @ matrix)
            alike(face, given(face, other) @ mine, other @ theirs)
            ours_too, theirs_too = pair(face, matrix, drawn(width, 3))
            alike(face, mine @ ours_too, theirs @ theirs_too)
    vector, row = drawn(theirs.rdim), drawn(theirs.ldim)
    alike(face, mine @ given(face, vector), theirs @ vector)
    alike(face, given(face, row) @ mine, row @ theirs)
    for number in (3, 0.5, torch.tensor([2.0], dtype=torch.float64)):
        alike(face, mine * given(face, number), theirs * number)
        alike(face, given(face, number) * mine, number * theirs)


INDICES: list[Any] = [
    0, -1, (1, 2), (slice(None), 1), (1, slice(1, None)), (1, 2, 3), (1, -1, -1), (1, 2, 3, -1), (0, 0, slice(2), slice(1, 4)),
    (None, 1), (slice(None), slice(None), [0, 2]), (slice(None), slice(None), slice(None), [3]), [1, 0], ([1, 0], [2, 3]),
    (slice(None), slice(None), torch.tensor([4, 0]), slice(1, 3)),
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indices(face: str, index: Any) -> None:
    mine, theirs = pair(face, drawn(2, 4, 5, 3), drawn(2, 4, 3, 7))
    alike(face, mine[index], theirs[index])


def test_reversed_slices_that_torch_has_not() -> None:
    matrix = graphlens.torch.FactoredMatrix(drawn(2, 4, 5, 3), drawn(2, 4, 3, 7))
    for index in ((slice(None, None, -1),), (0, 1, slice(None, None, -2)), (..., slice(4, 1, -1))):
        np.testing.assert_array_equal(matrix[index].AB.numpy(), matrix.AB.numpy()[index])
    assert matrix[1].A.data_ptr() == matrix.A[1].data_ptr()  # a view, as a tensor's index is


def test_tensors_keep_dtypes_and_gradients() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        left, right = drawn(5, 3, dtype=dtype), drawn(3, 5, dtype=dtype)
        mine, theirs = pair("tensors", left, right)
        assert mine.A is left
        assert mine.AB.dtype == theirs.AB.dtype == dtype
        assert torch.equal(mine.AB, theirs.AB)
        assert mine.eigenvalues.dtype == theirs.eigenvalues.dtype
    wide = graphlens.torch.FactoredMatrix(drawn(5, 3, dtype=torch.float32), drawn(3, 5))
    assert wide.AB.dtype == torch.float64
    results = []
    for kind in (graphlens.torch.FactoredMatrix, Theirs):
        left, right = drawn(2, 5, 3).requires_grad_(), drawn(2, 3, 4).requires_grad_()
        matrix = kind(left, right)
        total = matrix.norm().sum() + (matrix[1, 2:4] @ drawn(4)).sum() + (matrix.T @ drawn(5, 2)).AB.sum()
        total.backward()
        results.append((total.detach(), left.grad, right.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_what_multiplies_as_a_tensor_does_is_taken() -> None:
    class Wrapped:
        """A tensor inside of something else."""

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor
            self.ndim, self.shape = tensor.ndim, tensor.shape

        def unsqueeze(self, axis: int) -> Wrapped:
            return Wrapped(self.tensor.unsqueeze(axis))

        def squeeze(self, axis: int) -> Wrapped:
            return Wrapped(self.tensor.squeeze(axis))

        def broadcast_to(self, shape: Any) -> Wrapped:
            return Wrapped(self.tensor.broadcast_to(shape))

        def __matmul__(self, other: Any) -> Any:
            if isinstance(other, graphlens.FactoredMatrix):
                return NotImplemented
            return Wrapped(self.tensor @ getattr(other, "tensor", other))

        def __rmatmul__(self, other: torch.Tensor) -> Wrapped:
            return Wrapped(other @ self.tensor)

    left, right = drawn(2, 3), drawn(3, 4)
    mine: Any = graphlens.torch.FactoredMatrix(left, right)
    for found, expected in (
        ((mine @ Wrapped(drawn(4, 5))).AB, left @ right @ drawn(4, 5)),
        ((Wrapped(drawn(5, 2)) @ mine).AB, drawn(5, 2) @ left @ right),
        (mine @ Wrapped(drawn(4)), left @ right @ drawn(4)),
    ):
        assert isinstance(found, Wrapped)
        torch.testing.assert_close(found.tensor, expected)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies(face: str, copied: Any) -> None:
    mine, theirs = pair(face, drawn(5, 3), drawn(2, 3, 4))
    mine.svd()
    alike(face, copied(mine), theirs)


def test_the_weights_of_a_model_cannot_be_written_into() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = graphlens.torch.HookedTransformer.from_onnx(graphlens.embedded_model(), "cpu")
        matrix = model.OV[1]
    with pytest.raises(InputError, match="set_weights"):
        matrix.A[0] = 0
    assert type(matrix.AB) is type(matrix.S) is torch.Tensor
    assert isinstance(matrix, graphlens.FactoredMatrix)


REFUSED: dict[str, tuple[Any, tuple[type[Exception], ...]]] = {
    "inner": (lambda f, g: f(g(drawn(5, 3)), g(drawn(4, 7))), (ValueError, RuntimeError)),
    "no matrix": (lambda f, g: f(g(drawn(3)), g(drawn(3, 7))), (ValueError,)),
    "leading": (lambda f, g: f(g(drawn(9, 5, 3)), g(drawn(2, 4, 3, 7))), (ValueError, RuntimeError)),
    "right": (lambda f, g: f(g(drawn(5, 3)), g(drawn(3, 7))) @ g(drawn(6, 2)), (ValueError, RuntimeError)),
    "left": (lambda f, g: g(drawn(2, 6)) @ f(g(drawn(5, 3)), g(drawn(3, 7))), (ValueError, RuntimeError)),
    "batches": (
        lambda f, g: f(g(drawn(2, 3, 4)), g(drawn(2, 4, 6))) @ f(g(drawn(4, 6, 7)), g(drawn(4, 7, 2))),
        (ValueError, RuntimeError),
    ),
    "square": (lambda f, g: f(g(drawn(5, 3)), g(drawn(3, 7))).BA, (ValueError,)),
    "eigenvalues": (lambda f, g: f(g(drawn(5, 3)), g(drawn(3, 7))).eigenvalues, (ValueError,)),
    "several numbers": (lambda f, g: f(g(drawn(5, 3)), g(drawn(3, 7))) * g(drawn(2, 2)), (ValueError,)),
    "several numbers before": (lambda f, g: g(drawn(2)) * f(g(drawn(5, 3)), g(drawn(3, 7))), (ValueError,)),
    "beyond": (lambda f, g: f(g(drawn(2, 5, 3)), g(drawn(2, 3, 7)))[2], (ValueError, IndexError)),
    "beyond columns": (lambda f, g: f(g(drawn(5, 3)), g(drawn(3, 7)))[0, 7], (ValueError, IndexError)),
    "too long": (lambda f, g: f(g(drawn(5, 3)), g(drawn(3, 7)))[0, 0, 0], (ValueError, IndexError)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_of_the_kind_that_numpy_s_and_torch_s_are(face: str, case: str) -> None:
    ask, kinds = REFUSED[case]
    for kind in (*kinds, InputError):
        with pytest.raises(kind):
            ask(FACES[face], lambda value: given(face, value))
