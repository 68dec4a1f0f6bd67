"""``transformer_lens.utilities.library_utils``: whether a package is installed."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.tensors import is_library_available as is_library_available

__getattr__ = refusing(__name__)
