"""``transformer_lens.factories.activation_function_factory``: the activation function of a configuration."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.activations import ActivationFunctionFactory as ActivationFunctionFactory

__getattr__ = refusing(__name__)
