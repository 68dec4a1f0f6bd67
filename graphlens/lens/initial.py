"""Random initial weights by TransformerLens's conventions, into tensors of one's own."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import nn

from graphlens.analysis.arrays import UserArray
from graphlens.errors import InputError

NonlinearityType: TypeAlias = Literal[
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "sigmoid",
    "tanh",
    "relu",
    "leaky_relu",
    "selu",
]


def calc_fan_in_and_fan_out(tensor: UserArray) -> tuple[int, int]:
    """How many inputs and outputs a weight has, the inputs first in its shape as in TransformerLens.

    Args:
        tensor: A bias [d], a matrix [inputs, outputs], or the matrices of heads [heads, inputs, outputs].

    Returns:
        (inputs, outputs); a bias has one input, and heads have all outputs together.

    Raises:
        InputError: For other numbers of axes.
    """
    match tuple(tensor.shape):
        case (outputs,):
            return 1, outputs
        case (inputs, outputs):
            return inputs, outputs
        case (heads, inputs, outputs):
            return inputs, heads * outputs
        case shape:
            raise InputError(f"a weight of shape {list(shape)} has no inputs and outputs: it has 1, 2 or 3 axes.")


def init_xavier_uniform_(param: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
    """Fills a tensor from a uniform distribution by Xavier's rule.

    Args:
        param: float; see calc_fan_in_and_fan_out.
        gain: A factor.

    Returns:
        The tensor itself.
    """
    inputs, outputs = calc_fan_in_and_fan_out(param)
    most = gain * math.sqrt(6.0 / (inputs + outputs))
    return nn.init.uniform_(param, -most, most)


def init_xavier_normal_(param: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
    """Fills a tensor from a normal distribution by Xavier's rule.

    Args:
        param: float; see calc_fan_in_and_fan_out.
        gain: A factor.

    Returns:
        The tensor itself.
    """
    inputs, outputs = calc_fan_in_and_fan_out(param)
    return nn.init.normal_(param, mean=0.0, std=gain * math.sqrt(2.0 / (inputs + outputs)))


def init_kaiming_uniform_(
    param: torch.Tensor,
    a: float = 0,
    nonlinearity: NonlinearityType = "relu",
    gain: float = 1.0,
    mode: str = "fan_in",
) -> torch.Tensor:
    """Fills a tensor from a uniform distribution by Kaiming's rule.

    Args:
        param: float; see calc_fan_in_and_fan_out.
        a: A parameter of the nonlinearity, where it has one.
        nonlinearity: What comes before the weight, by torch's names.
        gain: A factor besides that of the nonlinearity.
        mode: "fan_in" counts inputs, anything else outputs.

    Returns:
        The tensor itself.
    """
    most = _kaiming(param, a, nonlinearity, gain, mode, 3.0)
    return nn.init.uniform_(param, -most, most)


def init_kaiming_normal_(
    param: torch.Tensor,
    a: float = 0,
    nonlinearity: NonlinearityType = "relu",
    gain: float = 1.0,
    mode: str = "fan_in",
) -> torch.Tensor:
    """Fills a tensor from a normal distribution by Kaiming's rule.

    Args:
        param: float; see calc_fan_in_and_fan_out.
        a: A parameter of the nonlinearity, where it has one.
        nonlinearity: What comes before the weight, by torch's names.
        gain: A factor besides that of the nonlinearity.
        mode: "fan_in" counts inputs, anything else outputs.

    Returns:
        The tensor itself.
    """
    return nn.init.normal_(param, mean=0.0, std=_kaiming(param, a, nonlinearity, gain, mode, 1.0))


def _kaiming(param: torch.Tensor, a: float, nonlinearity: str, gain: float, mode: str, variance: float) -> float:
    """The scale by Kaiming's rule of a distribution whose variance is 1 / ``variance`` where its scale is 1."""
    inputs, outputs = calc_fan_in_and_fan_out(param)
    factor: float = nn.init.calculate_gain(nonlinearity, a)
    return gain * factor * math.sqrt(variance / (inputs if mode == "fan_in" else outputs))
