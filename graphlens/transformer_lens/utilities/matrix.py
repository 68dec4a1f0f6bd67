"""``transformer_lens.utilities.matrix``: composition of matrices."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.tensors import get_matrix_corner as get_matrix_corner
from graphlens.utils import composition_scores as composition_scores

__getattr__ = refusing(__name__)
