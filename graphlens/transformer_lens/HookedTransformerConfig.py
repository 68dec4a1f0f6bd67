"""``transformer_lens.HookedTransformerConfig``, where TransformerLens 2 had it."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.torch import HookedTransformerConfig as HookedTransformerConfig

__getattr__ = refusing(__name__)
