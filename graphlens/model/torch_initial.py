"""The weights that a model from a config begins with, by torch's generator and in TransformerLens's order."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch

from graphlens.analysis.arrays import Array, as_array
from graphlens.model.config import HookedTransformerConfig
from graphlens.model.dtypes import dtype_name
from graphlens.model.initial import Parameter


def drawn(config: HookedTransformerConfig, parameters: Sequence[Parameter]) -> dict[str, Array]:
    """What each parameter begins as.

    Args:
        config: Says how they are drawn.
        parameters: In the order in which they are drawn.

    Returns:
        Name -> array, in the config's dtype (bfloat16 as float32).
    """
    dtype = getattr(torch, dtype_name(config.dtype))
    own = None
    if config.seed is not None and config.init_weights:
        torch.manual_seed(config.seed)
        own = torch.Generator().manual_seed(
            config.seed
        )  # torch's is every thread's, and these draws are the seed's alone
    found = {}
    for parameter in parameters:
        tensor = torch.full(parameter.shape, parameter.begins or 0, dtype=dtype)
        if parameter.begins is None and config.init_weights:
            _draw(tensor, parameter.name, config.init_mode, config.initializer_range, own)
        found[parameter.name] = as_array(tensor)
    if own is not None:
        torch.set_rng_state(own.get_state())  # whatever is drawn next is what follows there
    return found


def _draw(tensor: torch.Tensor, name: str, mode: str, scale: float, own: torch.Generator | None) -> None:
    """Draws a weight in place. ``scale`` is a standard deviation for "gpt2", and a factor for the others; ``own`` is where
    the draws come from, None for torch's generator."""
    shape = tensor.shape
    fan_in, fan_out = (shape[-2], shape[-1]) if len(shape) == 2 else (shape[1], shape[0] * shape[2])
    if mode == "gpt2":
        deviation, uniform = scale, False
    elif mode == "muP":  # in TransformerLens "embed" is found in "unembed" too
        deviation, uniform = (1.0 if "embed" in name else 1 / fan_in**0.5), False
    else:
        kind, _, distribution = mode.partition("_")
        uniform = distribution == "uniform"
        numerator = 6.0 if uniform and kind == "xavier" else 3.0 if uniform else 2.0 if kind == "xavier" else 1.0
        factor = scale if kind == "xavier" else scale * math.sqrt(2.0)
        deviation = factor * math.sqrt(numerator / (fan_in + fan_out if kind == "xavier" else fan_in))
    if uniform:
        tensor.uniform_(-deviation, deviation, generator=own)
    else:
        tensor.normal_(0, deviation, generator=own)


@contextlib.contextmanager
def generator_kept() -> Iterator[None]:
    """What is drawn inside the block takes nothing from torch's generator: an export may or may not have to be made."""
    with torch.random.fork_rng(devices=[]):
        yield
