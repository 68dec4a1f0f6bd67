"""TransformerLens's helpers for tensors, which take arrays too: corners, shapes, cumulative sums. No torch needed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT, as_array, is_tensor
from graphlens.errors import InputError, InputTypeError

if TYPE_CHECKING:
    import torch  # of which mypy knows nothing: what is annotated so may be an array too

ValueT = TypeVar("ValueT")


def to_numpy(tensor: torch.Tensor) -> Array:
    """The NumPy array of a tensor on any device, a list, a tuple, a number or a string.

    Args:
        tensor: What is to be an array. An array is handed back as it is; bfloat16, which NumPy lacks, becomes float32.

    Returns:
        An array of the same shape, over the same memory where that is possible.

    Raises:
        InputTypeError: For anything else.
    """
    if isinstance(tensor, np.ndarray):
        return tensor
    if isinstance(tensor, (list, tuple, bool, int, float, str)):
        return np.array(tensor)
    if is_tensor(tensor):
        return as_array(tensor)
    raise InputTypeError(
        f"{type(tensor).__name__} is an invalid type for to_numpy: it takes a tensor, an array, a list, a tuple or a number."
    )


def get_corner(tensor: torch.Tensor, n: int = 3) -> torch.Tensor:
    """The first ``n`` entries along every axis, for a look at a large tensor.

    Args:
        tensor: An array, a tensor or a FactoredMatrix.
        n: How many entries.

    Returns:
        A part of the same kind.
    """
    return tensor[(slice(n),) * tensor.ndim]


def get_matrix_corner(matrix: torch.Tensor, n: int = 3) -> torch.Tensor:
    """The first ``n`` rows and columns of a FactoredMatrix, multiplied out.

    Args:
        matrix: A FactoredMatrix [..., l, r].
        n: How many entries along every axis.

    Returns:
        [..., n, n], with leading axes cut to ``n`` too.
    """
    return get_corner(matrix, n).AB


def remove_batch_dim(tensor: ArrayT) -> ArrayT:
    """Without its first axis, where that has one entry; otherwise as it is.

    Args:
        tensor: An array or a tensor with one axis at least.

    Returns:
        [...] of [1, ...], over the same memory; otherwise the tensor itself.
    """
    found: ArrayT = tensor[0] if tensor.shape[0] == 1 else tensor
    return found


def transpose(tensor: torch.Tensor) -> torch.Tensor:
    """With the last two axes exchanged, over the same memory.

    Args:
        tensor: An array or a tensor [..., a, b].

    Returns:
        [..., b, a].
    """
    return tensor.swapaxes(-1, -2)


def is_square(x: torch.Tensor) -> bool:
    """True for a matrix [n, n].

    Args:
        x: An array or a tensor.

    Returns:
        False for what has another number of axes than two.
    """
    return bool(x.ndim == 2 and x.shape[0] == x.shape[1])


def is_lower_triangular(x: torch.Tensor) -> bool:
    """True for a square matrix with nothing but zeros above its diagonal.

    Args:
        x: An array or a tensor.

    Returns:
        False for what is no square matrix.
    """
    return is_square(x) and not np.triu(as_array(x), 1).any()


def check_structure(t1: torch.Tensor, t2: torch.Tensor, *, verbose: bool = False) -> None:
    """Prints whether neighbouring rows, and neighbouring columns, of two matrices compare the same way.

    Args:
        t1: A matrix [n, m].
        t2: Another of that shape.
        verbose: True prints each pair of rows or columns that differs.

    Raises:
        InputError: For two that are no matrices of one shape.
    """
    first, second = as_array(t1), as_array(t2)
    if first.ndim != 2 or first.shape != second.shape:
        raise InputError(
            f"check_structure takes two matrices of one shape, not {list(first.shape)}, {list(second.shape)}."
        )
    found = {}
    for what, axis in (("row", 0), ("column", 1)):
        if verbose:
            print(f"Checking {what}s")
        one, other = (np.moveaxis(each, axis, 0) for each in (first, second))
        one, other = one[:-1] >= one[1:], other[:-1] >= other[1:]
        found[what] = np.flatnonzero((one != other).any(1)).tolist()
        for at in found[what] if verbose else ():
            print(f"\t{what}s {at}:{at + 1}\n\tt1: {one[at].tolist()}\n\tt2: {other[at].tolist()}")
    if not any(found.values()):
        print("PASSED")
    elif found["row"]:
        print(f"row mismatch: {found['row']}")
    else:
        print(f"column mismatch: {found['column']}")


def get_cumsum_along_dim(tensor: torch.Tensor, dim: int, reverse: bool = False) -> torch.Tensor:
    """The cumulative sum along an axis.

    Args:
        tensor: An array or a tensor.
        dim: The axis.
        reverse: True sums from the end.

    Returns:
        Of the same shape and kind.
    """

    def flipped(of: torch.Tensor) -> torch.Tensor:
        if not reverse:
            return of
        return of.flip(dims=(dim,)) if hasattr(of, "detach") else np.flip(of, dim)

    return flipped(flipped(tensor).cumsum(dim))


def get_offset_position_ids(past_kv_pos_offset: int, attention_mask: torch.Tensor) -> torch.Tensor:
    """The position of each new token, counted from the first token that is no padding.

    Args:
        past_kv_pos_offset: How many positions a KV cache holds already.
        attention_mask: int [b, p], of those and the new ones: 1 at real tokens, 0 at padding.

    Returns:
        int [b, p - past_kv_pos_offset]; 0 at padding before the first token.
    """
    positions = attention_mask.cumsum(1) - 1
    return (positions * (positions >= 0))[:, past_kv_pos_offset:]


def repeat_along_head_dimension(tensor: torch.Tensor, n_heads: int, clone_tensor: bool = True) -> torch.Tensor:
    """The same vectors once for each head.

    Args:
        tensor: An array or a tensor [b, p, d_model].
        n_heads: How many heads.
        clone_tensor: False gives a view, whose heads share memory.

    Returns:
        [b, p, n_heads, d_model].
    """
    shape = (*tensor.shape[:2], n_heads, tensor.shape[2])
    if is_tensor(tensor):
        repeated: torch.Tensor = tensor[:, :, None].expand(*shape)
        return repeated.clone() if clone_tensor else repeated
    repeated = np.broadcast_to(tensor[:, :, None], shape)
    return repeated.copy() if clone_tensor else repeated


def filter_dict_by_prefix(dictionary: Mapping[str, ValueT], prefix: str) -> dict[str, ValueT]:
    """The entries below a prefix, without it in their keys.

    >>> filter_dict_by_prefix({"blocks.0.attn.W_Q": 1, "blocks.1.attn.W_Q": 2}, "blocks.0")
    {'attn.W_Q': 1}

    Args:
        dictionary: What to look through, a state dict say.
        prefix: Where to look; a dot follows it in the keys, whether it ends with one or not.

    Returns:
        A new dictionary, in the same order; empty where no key begins so.
    """
    start = prefix if prefix.endswith(".") else f"{prefix}."
    return {key[len(start) :]: value for key, value in dictionary.items() if key.startswith(start)}


def get_nested_attr(obj: object, attr_str: str) -> object:
    """An attribute of an attribute, by a path such as ``"attn.hook_q"``.

    Args:
        obj: Where to begin.
        attr_str: Names with dots between them.

    Returns:
        The last of them.

    Raises:
        AttributeError: One of them is not there.
    """
    for name in attr_str.split("."):
        obj = getattr(obj, name)
    return obj


def set_nested_attr(obj: object, attr_str: str, value: object) -> None:
    """Sets an attribute of an attribute; see ``get_nested_attr``.

    Args:
        obj: Where to begin.
        attr_str: Names with dots between them; the last is set.
        value: What to.

    Raises:
        AttributeError: One of the others is not there.
    """
    path, _, last = attr_str.rpartition(".")
    setattr(get_nested_attr(obj, path) if path else obj, last, value)


def is_library_available(name: str) -> bool:
    """True if a package is installed, which is found out without importing it.

    Args:
        name: The name that it is imported by.

    Returns:
        False where there is none of that name.
    """
    return name in sys.modules or importlib.util.find_spec(name) is not None
