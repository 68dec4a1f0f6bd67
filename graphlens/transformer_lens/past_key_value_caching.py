"""``transformer_lens.past_key_value_caching``: the KV cache, where TransformerLens 2 had it."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.torch import HookedTransformerKeyValueCache as HookedTransformerKeyValueCache
from graphlens.torch import HookedTransformerKeyValueCacheEntry as HookedTransformerKeyValueCacheEntry

__getattr__ = refusing(__name__)
