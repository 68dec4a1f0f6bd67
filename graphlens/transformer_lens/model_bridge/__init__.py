"""``transformer_lens.model_bridge``: TransformerLens 4's model."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.bridge import TransformerBridge as TransformerBridge

__getattr__ = refusing(__name__)
