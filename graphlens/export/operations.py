"""What the traced forwards are made of: marks of hook points, activation functions, norms, linear maps and rotations.

Hook points are marked with a symbolic operator that the optimiser keeps; build.py turns the marks into names.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

HOOK_DOMAIN = "ai.graphlens"
HOOK_OP, FORK_OP = "HookPoint", "Fork"


def _tanh_gelu(x: Tensor) -> Tensor:
    """GELU by the tanh formula, which exports as one node."""
    return functional.gelu(x, approximate="tanh")


def _squared_relu(x: Tensor) -> Tensor:
    """The square of ReLU."""
    positive = functional.relu(x)
    return positive * positive


def _solu(x: Tensor) -> Tensor:
    """Each number times its share in the softmax of the last axis."""
    return x * torch.softmax(x, dim=-1)


# By their names in transformers' configs.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_python": functional.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "swish": functional.silu,
    # TransformerLens's own; in "solu_ln" a norm follows, which is no part of the function.
    "relu2": _squared_relu,
    "solu": _solu,
    "solu_ln": _solu,
}


def hook_point(x: Tensor, name: str) -> Tensor:
    """Marks a tensor as a hook point, for export and optimiser to keep.

    Args:
        x: The activation.
        name: The hook point's full name.

    Returns:
        The same tensor for all that reads it: same shape and dtype.
    """
    return _symbolic(HOOK_OP, x, name)


def fork(x: Tensor, name: str) -> Tensor:
    """A copy of a tensor that the optimiser does not see through, so that what reads it is not merged with other readers.

    Args:
        x: The tensor.
        name: What reads the copy.
    """
    return _symbolic(FORK_OP, x, name)


def _symbolic(operator: str, x: Tensor, name: str) -> Tensor:
    """An operator of our own on a tensor, which gives it back."""
    if not isinstance(x, Tensor):  # a recorded one
        found: Tensor = x.marked(operator, name)
        return found
    return torch.onnx.ops.symbolic(
        f"{HOOK_DOMAIN}::{operator}", (x,), {"name": name}, dtype=x.dtype, shape=x.shape, version=1
    )


class Norm(nn.Module):
    """A LayerNorm or RMSNorm written out, with hook_scale and hook_normalized marked (the affine comes after)."""

    def __init__(self, module: nn.Module, centred: bool, plus_one: bool, eps: float) -> None:
        super().__init__()
        for key, value in module.named_parameters(recurse=False):
            self.register_parameter(key, value)
        self.centred, self.plus_one, self.eps = centred, plus_one, eps

    def forward(self, x: Tensor, name: str) -> Tensor:
        """The norm of ``x`` over its last axis, its hook points under ``name``."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        scale = hook_point(torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps), f"{name}.hook_scale")
        x = hook_point(x / scale, f"{name}.hook_normalized")
        weight, bias = getattr(self, "weight", None), getattr(self, "bias", None)
        if weight is not None:
            x = x * (weight + 1.0 if self.plus_one else weight)
        return x if bias is None else x + bias


def linear(module: nn.Module, x: Tensor, transposed: bool) -> Tensor:
    """A linear map of the last axis of ``x``, as one Gemm that reads the weight as stored, untransposed."""
    flat = x.reshape(-1, x.shape[-1])
    if transposed and module.bias is None:
        flat = flat @ module.weight
    elif transposed:
        flat = torch.addmm(module.bias, flat, module.weight)
    else:
        flat = functional.linear(flat, module.weight, module.bias)
    return flat.reshape(*x.shape[:-1], flat.shape[-1])


def rotated(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
    """Queries or keys [b, p, h, d] rotated by their positions; cos and sin [b, p, r], r <= d."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    size = cos.shape[-1]
    # Split, and not an index: it has a derivative.
    turning, rest = (x, None) if size == x.shape[-1] else x.split([size, x.shape[-1] - size], -1)
    if pairs:
        first, second = turning.reshape(*turning.shape[:-1], size // 2, 2).split([1, 1], -1)
        turned = torch.cat([-second, first], -1).reshape(turning.shape)
    else:
        first, second = turning.split([size // 2, size // 2], -1)
        turned = torch.cat([-second, first], -1)
    turned = turning * cos + turned * sin
    return turned if rest is None else torch.cat([turned, rest], -1)


class LongRotary(nn.Module):
    """Cosines and sines by other frequencies as soon as an input is longer than ``short`` positions (longrope)."""

    def __init__(self, module: nn.Module, short: int) -> None:
        super().__init__()
        self.inv_freq = module.inv_freq
        self.long_inv_freq = nn.Buffer(torch.empty_like(module.inv_freq), persistent=False)
        self.short, self.scaling = short, float(module.attention_scaling)

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [b, p, r] of positions [b, p], in the dtype of ``x``."""
        frequencies = torch.where(positions.max() >= self.short, self.long_inv_freq, self.inv_freq)
        angles = positions.unsqueeze(-1).to(frequencies.dtype) * frequencies
        angles = torch.cat([angles, angles], -1)
        return (angles.cos() * self.scaling).to(x.dtype), (angles.sin() * self.scaling).to(x.dtype)
