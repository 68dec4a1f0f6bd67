"""``transformer_lens.factories``: what a configuration picks."""

from __future__ import annotations

from graphlens.lens.absent import refusing

__getattr__ = refusing(__name__)
