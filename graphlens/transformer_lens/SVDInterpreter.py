"""``transformer_lens.SVDInterpreter``: the directions that weights work in."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.svd_interpreter import OUTPUT_EMBEDDING as OUTPUT_EMBEDDING
from graphlens.lens.svd_interpreter import VECTOR_TYPES as VECTOR_TYPES
from graphlens.lens.svd_interpreter import SVDInterpreter as SVDInterpreter

__getattr__ = refusing(__name__)
