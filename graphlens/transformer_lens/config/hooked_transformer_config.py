"""``transformer_lens.config.hooked_transformer_config``: the configuration of a model."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.torch import HookedTransformerConfig as HookedTransformerConfig

__getattr__ = refusing(__name__)
