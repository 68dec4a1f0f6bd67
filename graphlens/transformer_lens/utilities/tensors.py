"""``transformer_lens.utilities.tensors``: small helpers for tensors."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.tensors import check_structure as check_structure
from graphlens.lens.tensors import filter_dict_by_prefix as filter_dict_by_prefix
from graphlens.lens.tensors import get_corner as get_corner
from graphlens.lens.tensors import get_cumsum_along_dim as get_cumsum_along_dim
from graphlens.lens.tensors import get_offset_position_ids as get_offset_position_ids
from graphlens.lens.tensors import is_lower_triangular as is_lower_triangular
from graphlens.lens.tensors import is_square as is_square
from graphlens.lens.tensors import remove_batch_dim as remove_batch_dim
from graphlens.lens.tensors import repeat_along_head_dimension as repeat_along_head_dimension
from graphlens.lens.tensors import to_numpy as to_numpy
from graphlens.lens.tensors import transpose as transpose

__getattr__ = refusing(__name__)
