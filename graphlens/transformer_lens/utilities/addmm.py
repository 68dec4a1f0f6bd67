"""``transformer_lens.utilities.addmm``: products with a bias."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.linear import batch_addmm as batch_addmm
from graphlens.lens.linear import vanilla_addmm as vanilla_addmm

__getattr__ = refusing(__name__)
