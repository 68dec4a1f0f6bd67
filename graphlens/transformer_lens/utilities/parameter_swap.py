"""``transformer_lens.utilities.parameter_swap``: another value of a parameter, for a while."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.linear import temporarily_swap_parameter as temporarily_swap_parameter

__getattr__ = refusing(__name__)
