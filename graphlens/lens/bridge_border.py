"""What TransformerBridge differs in from the torch face where arrays cross: the names of hook points."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphlens.lens.bridge_hooks import BridgeHooks
from graphlens.model.hooks import HookRegistry
from graphlens.model.runner import Runner
from graphlens.model.torch_border import TorchBorder


@dataclass(frozen=True)
class BridgeBorder(TorchBorder):
    """Tensors in and out, and hook points by TransformerLens 4's names.

    Attributes:
        compatibility_mode: See ``TransformerBridge.enable_compatibility_mode``.
    """

    compatibility_mode: bool = False

    def registry(self, runner: Runner[torch.Tensor]) -> HookRegistry:
        """The model's hooks by TransformerLens 4's names."""
        return BridgeHooks(runner)
