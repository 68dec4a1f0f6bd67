"""``transformer_lens.FactoredMatrix``: a product of two matrices, kept as its factors."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.torch import FactoredMatrix as FactoredMatrix

__getattr__ = refusing(__name__)
