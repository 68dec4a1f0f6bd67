"""``transformer_lens.utilities.attention``: queries, keys and values."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.linear import clamp_qkv as clamp_qkv
from graphlens.lens.linear import complex_attn_linear as complex_attn_linear
from graphlens.lens.linear import simple_attn_linear as simple_attn_linear

__getattr__ = refusing(__name__)
