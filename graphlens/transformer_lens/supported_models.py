"""``transformer_lens.supported_models``: names of the models that load."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.pretrained import DEFAULT_MODEL_ALIASES as DEFAULT_MODEL_ALIASES
from graphlens.lens.pretrained import MODEL_ALIASES as MODEL_ALIASES
from graphlens.lens.pretrained import OFFICIAL_MODEL_NAMES as OFFICIAL_MODEL_NAMES

__getattr__ = refusing(__name__)
