"""``transformer_lens.cache.key_value_cache``: the KV cache."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.torch import TransformerLensKeyValueCache as TransformerLensKeyValueCache

__getattr__ = refusing(__name__)
