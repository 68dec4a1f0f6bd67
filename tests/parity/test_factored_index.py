"""Indices of FactoredMatrix on the torch face: a tensor as an index is the array of the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings

from graphlens.errors import InputError
from graphlens.model.torch_factored import FactoredMatrix as TorchFactored
from graphlens.utils import FactoredMatrix
from tests.core.test_factored_matrix import indices

A, B = (np.random.default_rng(seed).normal(size=size) for seed, size in ((1, (2, 3, 5, 3)), (2, (2, 3, 3, 4))))


def tensor_of(item: Any) -> Any:
    array = isinstance(item, np.ndarray | np.integer) or (isinstance(item, list) and item)
    return torch.from_numpy(np.asarray(item).copy()) if array else item


@settings(max_examples=100, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(indices((2, 3, 5, 4)))
def test_by_tensor_as_by_array(drawn: tuple[tuple[Any, ...], Any, Any]) -> None:
    index = drawn[0]
    tensors = tuple(map(tensor_of, index))
    try:
        expected = FactoredMatrix(A, B)[index]
    except InputError:
        with pytest.raises(InputError):
            TorchFactored(A, B)[tensors]
        return
    found = TorchFactored(A, B)[tensors]
    assert isinstance(found.AB, torch.Tensor)
    np.testing.assert_array_equal(found.A.numpy(), expected.A)
    np.testing.assert_array_equal(found.B.numpy(), expected.B)
    np.testing.assert_array_equal(FactoredMatrix(A, B)[tensors].AB, expected.AB)


def test_one_element_keeps_its_axis() -> None:
    for factored in (FactoredMatrix(A[0, 0], B[0, 0]), TorchFactored(A[0, 0], B[0, 0])):
        dense = A[0, 0] @ B[0, 0]
        np.testing.assert_allclose(np.asarray(factored[:, torch.tensor([1])].AB), dense[:, [1]])
        np.testing.assert_allclose(np.asarray(factored[torch.tensor([1])].AB), dense[[1]])
        np.testing.assert_allclose(
            np.asarray(factored[torch.tensor([False, True, False, False, True])].AB), dense[[1, 4]]
        )
