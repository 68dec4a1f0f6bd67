"""``transformer_lens.utilities.exploratory_utils``: a look at a prompt."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.utils import test_prompt as test_prompt

__getattr__ = refusing(__name__)
