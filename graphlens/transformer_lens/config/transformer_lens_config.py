"""``transformer_lens.config.transformer_lens_config``: the configuration of a model, of which there is one kind here."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.torch import HookedTransformerConfig

TransformerLensConfig = HookedTransformerConfig

__getattr__ = refusing(__name__)
