"""``transformer_lens.utilities.gpu_utils``: the GPU's memory."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.devices import print_gpu_mem as print_gpu_mem

__getattr__ = refusing(__name__)
