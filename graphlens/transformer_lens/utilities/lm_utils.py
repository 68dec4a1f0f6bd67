"""``transformer_lens.utilities.lm_utils``: the next-token loss."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.logits import lm_accuracy as lm_accuracy
from graphlens.lens.logits import lm_cross_entropy_loss as lm_cross_entropy_loss

__getattr__ = refusing(__name__)
