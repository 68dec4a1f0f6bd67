"""``transformer_lens.HookedRootModule``: the root of one's own modules with hook points."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.hooked_root_module import HookedRootModule as HookedRootModule

__getattr__ = refusing(__name__)
