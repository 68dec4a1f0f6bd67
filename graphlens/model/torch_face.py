"""The torch face: graphlens's models with torch tensors in and out, sharing memory with the NumPy ones."""

from __future__ import annotations

import torch

from graphlens.model import hooked_encoder, hooked_transformer
from graphlens.model.torch_border import TorchBorder
from graphlens.model.torch_factored import FactoredMatrix as FactoredMatrix


class HookedTransformer(hooked_transformer.HookedTransformer[torch.Tensor]):
    """graphlens.HookedTransformer, with tensors: same methods, same numbers, no copies on the CPU.

    Tensors come out on the CPU, whatever device the session runs on (see ``providers``); those handed in may be
    anywhere. Where backward hooks are active and grad is enabled, logits and a loss have a ``backward()`` that calls them (it
    runs the forward once more, forward hooks included); no other tensor carries a gradient. Weights are
    tensors that refuse to be written into: ``set_weights`` changes what the model computes.
    """

    def _border(self) -> TorchBorder:
        return TorchBorder()

    # What a torch module has

    @property
    def device(self) -> torch.device:
        """Where tensors come out: the CPU."""
        return torch.device("cpu")


class HookedEncoder(hooked_encoder.HookedEncoder[torch.Tensor]):
    """graphlens.HookedEncoder, with tensors; see HookedTransformer here."""

    def _border(self) -> TorchBorder:
        return TorchBorder()

    @property
    def device(self) -> torch.device:
        """Where tensors come out: the CPU."""
        return torch.device("cpu")
