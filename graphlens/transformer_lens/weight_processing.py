"""``transformer_lens.weight_processing``: weight processing of a state dict."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.process_weights import ProcessWeights as ProcessWeights

__getattr__ = refusing(__name__)
