"""The configuration of a model on the torch face: its dtype is a torch.dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphlens.model import config
from graphlens.model.config_of_model import Value
from graphlens.model.dtypes import dtype_name


@dataclass(repr=False)
class HookedTransformerConfig(config.HookedTransformerConfig):
    """graphlens.HookedTransformerConfig with a torch.dtype as ``dtype``; see there."""

    dtype: torch.dtype = torch.float32

    @staticmethod
    def _dtype(dtype: Value) -> torch.dtype:
        """A dtype as torch's."""
        found: torch.dtype = getattr(torch, dtype_name(dtype))
        return found
