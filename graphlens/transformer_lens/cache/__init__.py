"""``transformer_lens.cache``: the KV cache."""

from __future__ import annotations

from graphlens.lens.absent import refusing

__getattr__ = refusing(__name__)
