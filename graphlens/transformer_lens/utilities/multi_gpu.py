"""``transformer_lens.utilities.multi_gpu``: the device of a block."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.devices import get_best_available_device as get_best_available_device
from graphlens.lens.devices import get_device_for_block_index as get_device_for_block_index

__getattr__ = refusing(__name__)
