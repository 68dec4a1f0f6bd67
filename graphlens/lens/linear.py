"""TransformerLens's products of activations and weights, and a module list that knows what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import nn
from torch.nn import functional

from graphlens.errors import InputError, InputTypeError

if TYPE_CHECKING:
    from graphlens.model.kv_cache import KeyValueCache

ModuleT = TypeVar("ModuleT")


def vanilla_addmm(input: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor) -> torch.Tensor:
    """``mat1 @ mat2 + input``.

    Args:
        input: float, broadcast to [m, o].
        mat1: float [m, n].
        mat2: float [n, o].

    Returns:
        [m, o].
    """
    return torch.addmm(input, mat1, mat2)


def batch_addmm(bias: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``x @ weight + bias``, rounded as transformers' Conv1D rounds it.

    Args:
        bias: float [d_out].
        weight: float [d_in, d_out].
        x: float [..., d_in].

    Returns:
        [..., d_out].
    """
    return vanilla_addmm(bias, x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.shape[-1])


def simple_attn_linear(input: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The queries, keys or values of heads that read the same input.

    Args:
        input: float [batch, pos, d_model].
        w: float [head, d_model, d_head].
        b: float [head, d_head].

    Returns:
        [batch, pos, head, d_head].
    """
    w, b = w.to(input.device), b.to(input.device)
    matrix = w.transpose(1, 2).reshape(-1, w.shape[1])
    return functional.linear(input, matrix, b.reshape(-1)).reshape(*input.shape[:2], *b.shape)


def complex_attn_linear(input: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The queries, keys or values of heads that read an input of their own each.

    Args:
        input: float [batch, pos, head, d_model].
        w: float [head, d_model, d_head].
        b: float [head, d_head].

    Returns:
        [batch, pos, head, d_head].
    """
    return torch.einsum("bphm,hmd->bphd", input, w) + b


def clamp_qkv(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values bounded to [-clip, clip], as OLMo and MPT have them.

    Args:
        q: float [...].
        k: float [...].
        v: float [...].
        clip: The bound.

    Returns:
        New tensors of the same shapes.
    """
    return q.clamp(-clip, clip), k.clamp(-clip, clip), v.clamp(-clip, clip)


def get_pos_offset(past_kv_cache: KeyValueCache | None, batch_size: int) -> int:
    """How many positions a KV cache holds.

    Args:
        past_kv_cache: The cache; None holds none.
        batch_size: Changes nothing, as in TransformerLens: the cache knows its number of sequences.
    """
    return 0 if past_kv_cache is None else int(past_kv_cache.entries[0].past_keys.shape[1])


class TypedModuleList(nn.ModuleList, Generic[ModuleT]):
    """torch's ModuleList, annotated with the kind of module that it holds."""


@contextmanager
def temporarily_swap_parameter(parameter: nn.Parameter, new_value: torch.Tensor) -> Iterator[nn.Parameter]:
    """Another value of a torch parameter inside a ``with`` block; of a graphlens model use ``set_weights``.

    Args:
        parameter: The parameter, whose own object stays.
        new_value: The value, of its shape and dtype.

    Yields:
        The parameter.

    Raises:
        InputTypeError: For what is no parameter, or no plain tensor.
        InputError: For another shape or dtype.
    """
    if not isinstance(parameter, nn.Parameter):
        raise InputTypeError(
            f"parameter must be a torch.nn.Parameter, not {type(parameter).__name__}: the weights of a graphlens model are "
            "set with model.set_weights."
        )
    if isinstance(new_value, nn.Parameter) or not isinstance(new_value, torch.Tensor):
        raise InputTypeError(f"new_value must be a plain torch.Tensor, not {type(new_value).__name__}.")
    if (new_value.shape, new_value.dtype) != (parameter.shape, parameter.dtype):
        raise InputError(
            f"new_value has dtype {new_value.dtype} and shape {list(new_value.shape)}, and the parameter dtype "
            f"{parameter.dtype} and shape {list(parameter.shape)}: they must be the same."
        )
    before = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter.copy_(new_value)
        yield parameter
    finally:
        with torch.no_grad():
            parameter.copy_(before)
