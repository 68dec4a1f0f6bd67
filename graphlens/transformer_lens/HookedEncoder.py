"""``transformer_lens.HookedEncoder``: BERT and RoBERTa, with tensors."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.torch import HookedEncoder as HookedEncoder

__getattr__ = refusing(__name__)
