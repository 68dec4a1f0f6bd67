"""``transformer_lens.ActivationCache``: the activations of a run."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.torch import ActivationCache as ActivationCache

__getattr__ = refusing(__name__)
