"""``transformer_lens.utilities.logits_utils``: sampling from logits."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.logits import logits_to_df as logits_to_df
from graphlens.lens.logits import sample_logits as sample_logits

__getattr__ = refusing(__name__)
