"""``transformer_lens.HookedTransformer``: the model, with tensors."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.model.request import Output as Output
from graphlens.torch import HookedTransformer as HookedTransformer

__getattr__ = refusing(__name__)
