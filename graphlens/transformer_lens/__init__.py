"""TransformerLens's module layout over graphlens's torch face: the same names in the same places, nothing else.

``from graphlens.transformer_lens import HookedTransformer, utils`` is one way to use it. The other is to leave a script as it is
and to begin it with ``import graphlens.transformer_lens; graphlens.transformer_lens.install()``: every
``import transformer_lens...`` after that gives what is here.
"""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.installing import install as install
from graphlens.torch import KeyValueCache as KeyValueCache
from graphlens.transformer_lens import cache as cache
from graphlens.transformer_lens import components as components
from graphlens.transformer_lens import config as config
from graphlens.transformer_lens import evals as evals
from graphlens.transformer_lens import head_detector as head_detector
from graphlens.transformer_lens import hook_points as hook_points
from graphlens.transformer_lens import loading_from_pretrained as loading_from_pretrained
from graphlens.transformer_lens import model_bridge as model_bridge
from graphlens.transformer_lens import past_key_value_caching as past_key_value_caching
from graphlens.transformer_lens import patching as patching
from graphlens.transformer_lens import supported_models as supported_models
from graphlens.transformer_lens import utilities as utilities
from graphlens.transformer_lens import utils as utils

# After these, which are modules of the same name: here the names are the classes', as in TransformerLens.
from graphlens.transformer_lens.ActivationCache import ActivationCache as ActivationCache
from graphlens.transformer_lens.cache.key_value_cache import (
    TransformerLensKeyValueCache as TransformerLensKeyValueCache,
)
from graphlens.transformer_lens.cache.key_value_cache_entry import (
    TransformerLensKeyValueCacheEntry as TransformerLensKeyValueCacheEntry,
)
from graphlens.transformer_lens.FactoredMatrix import FactoredMatrix as FactoredMatrix
from graphlens.transformer_lens.HookedEncoder import HookedEncoder as HookedEncoder
from graphlens.transformer_lens.HookedRootModule import HookedRootModule as HookedRootModule
from graphlens.transformer_lens.HookedTransformer import HookedTransformer as HookedTransformer
from graphlens.transformer_lens.HookedTransformerConfig import HookedTransformerConfig as HookedTransformerConfig
from graphlens.transformer_lens.model_bridge import TransformerBridge as TransformerBridge
from graphlens.transformer_lens.past_key_value_caching import (
    HookedTransformerKeyValueCache as HookedTransformerKeyValueCache,
)
from graphlens.transformer_lens.past_key_value_caching import (
    HookedTransformerKeyValueCacheEntry as HookedTransformerKeyValueCacheEntry,
)
from graphlens.transformer_lens.SVDInterpreter import SVDInterpreter as SVDInterpreter

loading = loading_from_pretrained
# As TransformerLens 1 and 2 have them besides.
EasyTransformer = HookedTransformer
EasyTransformerConfig = HookedTransformerConfig
EasyTransformerKeyValueCache = HookedTransformerKeyValueCache
EasyTransformerKeyValueCacheEntry = HookedTransformerKeyValueCacheEntry

__getattr__ = refusing(__name__)
