"""``transformer_lens.utilities.cache``: what a KV cache holds."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.linear import get_pos_offset as get_pos_offset

__getattr__ = refusing(__name__)
