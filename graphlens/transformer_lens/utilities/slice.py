"""``transformer_lens.utilities.slice``: slices of one axis."""

from __future__ import annotations

from graphlens.analysis.slices import SliceInput as SliceInput
from graphlens.lens.absent import refusing
from graphlens.utils import Slice as Slice

__getattr__ = refusing(__name__)
