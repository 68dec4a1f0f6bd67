"""The activation functions that TransformerLens knows by name, on tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional

from graphlens.errors import InputError
from graphlens.model.torch_config import HookedTransformerConfig

ActivationFunction = Callable[..., torch.Tensor]
# The soft cap that caps nothing.
SOFTCAP_DISABLED = -1.0
_XIELU_ALPHA, _XIELU_BETA, _XIELU_EPS = 0.8, 0.5, -1e-6


def gelu_new(input: torch.Tensor) -> torch.Tensor:
    """GPT-2's GELU, by tanh.

    Args:
        input: float [...].

    Returns:
        Of the same shape.
    """
    inner = math.sqrt(2.0 / math.pi) * (input + 0.044715 * torch.pow(input, 3.0))
    return 0.5 * input * (1.0 + torch.tanh(inner))


def gelu_fast(input: torch.Tensor) -> torch.Tensor:
    """The same GELU as ``gelu_new`` with its constant rounded, as some models were trained with it.

    Args:
        input: float [...].

    Returns:
        Of the same shape.
    """
    return 0.5 * input * (1.0 + torch.tanh(input * 0.7978845608 * (1.0 + 0.044715 * input * input)))


def gelu_pytorch_tanh(input: torch.Tensor) -> torch.Tensor:
    """torch's own GELU by tanh.

    Args:
        input: float [...].

    Returns:
        Of the same shape.
    """
    return functional.gelu(input, approximate="tanh")


def solu(input: torch.Tensor) -> torch.Tensor:
    """x * softmax(x) over the last axis (https://transformer-circuits.pub/2022/solu/index.html), without its norm.

    Args:
        input: float [..., d_mlp].

    Returns:
        Of the same shape.
    """
    return input * functional.softmax(input, dim=-1)


def xielu(input: torch.Tensor) -> torch.Tensor:
    """xIELU (https://arxiv.org/abs/2411.13010) with the parameters that its training begins with.

    Args:
        input: float [...].

    Returns:
        Of the same shape.
    """
    linear = _XIELU_BETA * input
    bounded = torch.clamp(input, max=_XIELU_EPS)
    return torch.where(
        input > 0, _XIELU_ALPHA * input * input + linear, (torch.expm1(bounded) - input) * _XIELU_ALPHA + linear
    )


class XIELU(nn.Module):
    """xIELU with parameters of its own, stored as transformers stores them: through the inverse of softplus.

    Args:
        alpha_p_init: The slope's growth above 0.
        alpha_n_init: That below 0; more than ``beta_init``.
        beta_init: The slope at 0.
        eps: Where the exponential below 0 is cut off.
    """

    def __init__(
        self, alpha_p_init: float = 0.8, alpha_n_init: float = 0.8, beta_init: float = 0.5, eps: float = -1e-6
    ) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(torch.log(torch.expm1(torch.tensor(alpha_p_init))))
        self.alpha_n = nn.Parameter(torch.log(torch.expm1(torch.tensor(alpha_n_init - beta_init))))
        self.beta: torch.Tensor
        self.eps: torch.Tensor
        self.register_buffer("beta", torch.tensor(beta_init))
        self.register_buffer("eps", torch.tensor(eps))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The function of a tensor [...]; of the same shape."""
        above, below = functional.softplus(self.alpha_p), self.beta + functional.softplus(self.alpha_n)
        linear = self.beta * input
        bounded = torch.min(input, self.eps)
        return torch.where(input > 0, above * input * input + linear, (torch.expm1(bounded) - input) * below + linear)


def relu2(input: torch.Tensor) -> torch.Tensor:
    """relu(x) squared.

    Args:
        input: float [...].

    Returns:
        Of the same shape.
    """
    positive = functional.relu(input)
    return positive * positive


def softcap_enabled(cap: float | None) -> bool:
    """True if a soft cap caps anything: one that is more than 0.

    Args:
        cap: The cap; None, 0 and SOFTCAP_DISABLED cap nothing.
    """
    return cap is not None and cap > 0


def apply_softcap(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Gemma 2's bound on scores and logits: cap * tanh(x / cap).

    Args:
        x: float [...].
        cap: The bound; what ``softcap_enabled`` says no to leaves ``x`` as it is.

    Returns:
        Of the same shape.
    """
    if cap is None or not softcap_enabled(cap):
        return x
    return cap * torch.tanh(x / cap)


SUPPORTED_ACTIVATIONS: Mapping[str, ActivationFunction] = {
    "solu": solu,
    "solu_ln": solu,
    "gelu_new": gelu_new,
    "gelu_fast": gelu_fast,
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": gelu_pytorch_tanh,
    "xielu": xielu,
    "relu2": relu2,
}


class ActivationFunctionFactory:
    """Gives the activation function that a configuration names. TransformerLens: the same name."""

    @staticmethod
    def pick_activation_function(cfg: HookedTransformerConfig) -> ActivationFunction:
        """The activation function of a configuration, on tensors.

        Args:
            cfg: The configuration; its ``act_fn`` counts.

        Returns:
            A function of a tensor [...], which gives one of the same shape. "xielu" is a module with parameters of its own.

        Raises:
            InputError: It names none, or one that there is not.
        """
        if cfg.act_fn == "xielu":
            return XIELU()
        if cfg.act_fn is None or cfg.act_fn not in SUPPORTED_ACTIVATIONS:
            raise InputError(
                f"Invalid activation function name: act_fn is {cfg.act_fn!r}. There are {', '.join(SUPPORTED_ACTIVATIONS)}."
            )
        return SUPPORTED_ACTIVATIONS[cfg.act_fn]
