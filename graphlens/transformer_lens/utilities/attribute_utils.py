"""``transformer_lens.utilities.attribute_utils``: attributes of attributes."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.tensors import get_nested_attr as get_nested_attr
from graphlens.lens.tensors import set_nested_attr as set_nested_attr

__getattr__ = refusing(__name__)
