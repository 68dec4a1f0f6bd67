"""``transformer_lens.utilities.components_utils``: hook names in short."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.utils import get_act_name as get_act_name

__getattr__ = refusing(__name__)
