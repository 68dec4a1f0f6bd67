"""``transformer_lens.utilities.typed_module_list``: a module list that knows what it holds."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.linear import TypedModuleList as TypedModuleList

__getattr__ = refusing(__name__)
