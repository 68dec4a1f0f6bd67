"""``transformer_lens.config``: the configuration of a model."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.torch import HookedTransformerConfig as HookedTransformerConfig

# There is one kind of configuration here.
TransformerLensConfig = HookedTransformerConfig

__getattr__ = refusing(__name__)
