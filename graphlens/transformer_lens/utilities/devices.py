"""``transformer_lens.utilities.devices``: where a model can run."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.devices import get_best_available_device as get_best_available_device
from graphlens.lens.devices import get_device as get_device
from graphlens.lens.devices import get_device_for_block_index as get_device_for_block_index
from graphlens.lens.devices import move_to_and_update_config as move_to_and_update_config
from graphlens.lens.devices import warn_if_mps as warn_if_mps
from graphlens.lens.kinds import ModelWithCfg as ModelWithCfg

__getattr__ = refusing(__name__)
