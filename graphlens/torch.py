"""graphlens with tensors: the same classes as in ``graphlens``, whose methods take and give torch tensors."""

from __future__ import annotations

from graphlens.errors import RuntimeUnavailable

try:
    import torch  # noqa: F401
except ImportError as error:
    raise RuntimeUnavailable("graphlens.torch needs torch: pip install 'graphlens-onnx[torch]'.") from error

from graphlens.analysis.cache.activation_cache import ActivationCache
from graphlens.model.kv_cache import (
    HookedTransformerKeyValueCache,
    HookedTransformerKeyValueCacheEntry,
    KeyValueCache,
    KeyValueCacheEntry,
    TransformerLensKeyValueCache,
    TransformerLensKeyValueCacheEntry,
)
from graphlens.model.torch_face import FactoredMatrix, HookedEncoder, HookedTransformer

__all__ = [
    "ActivationCache",
    "FactoredMatrix",
    "HookedEncoder",
    "HookedTransformer",
    "HookedTransformerKeyValueCache",
    "HookedTransformerKeyValueCacheEntry",
    "KeyValueCache",
    "KeyValueCacheEntry",
    "TransformerLensKeyValueCache",
    "TransformerLensKeyValueCacheEntry",
]
