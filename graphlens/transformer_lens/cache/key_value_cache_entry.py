"""``transformer_lens.cache.key_value_cache_entry``: a layer of the KV cache."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.torch import TransformerLensKeyValueCacheEntry as TransformerLensKeyValueCacheEntry

__getattr__ = refusing(__name__)
