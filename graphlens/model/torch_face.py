"""The torch face: graphlens's models with torch tensors in and out, sharing memory with the NumPy ones."""

from __future__ import annotations

from typing import Protocol, Self

import torch

from graphlens.errors import InputError, RuntimeUnavailable
from graphlens.model import hooked_encoder, hooked_transformer
from graphlens.model.config import HookedTransformerConfig
from graphlens.model.torch_border import TorchBorder
from graphlens.model.torch_factored import FactoredMatrix as FactoredMatrix


class _Model(Protocol):
    """What is asked of a model that is to be somewhere."""

    @property
    def cfg(self) -> HookedTransformerConfig: ...

    @property
    def dtype(self) -> str: ...

    @property
    def providers(self) -> list[str]: ...


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

    def to(self, device_or_dtype: torch.dtype | torch.device | str, print_details: bool = True) -> Self:
        """The model itself, if it already is what is asked for: a session's device and dtype are fixed when it is opened.

        Args:
            device_or_dtype: What the model is to be.
            print_details: TransformerLens's; changes nothing.

        Raises:
            RuntimeUnavailable: For a GPU that the model does not run on.
            InputError: For another dtype or device.
        """
        _ensure_is(self, device_or_dtype)
        return self

    def cpu(self) -> Self:
        """The model itself: its tensors are on the CPU already."""
        return self.to("cpu")

    def cuda(self, device: int | str | torch.device | None = None) -> Self:
        """``to("cuda")``.

        Args:
            device: A GPU; None for "cuda".

        Raises:
            RuntimeUnavailable: If the model does not run on it.
        """
        return self.to("cuda" if device is None else torch.device(device))

    def eval(self) -> Self:
        """The model itself: there is no dropout to turn off."""
        return self

    def train(self, mode: bool = True) -> Self:
        """The model itself, which does not train.

        Args:
            mode: False, as ``eval`` has it.

        Raises:
            InputError: For True.
        """
        _ensure_frozen(mode, "a graphlens model does not train: train the checkpoint, then export it again.")
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """The model itself, whose weights have no gradients.

        Args:
            requires_grad: False.

        Raises:
            InputError: For True.
        """
        _ensure_frozen(requires_grad, "the weights of a graphlens model have no gradients.")
        return self


class HookedEncoder(hooked_encoder.HookedEncoder[torch.Tensor]):
    """graphlens.HookedEncoder, with tensors; see HookedTransformer here."""

    def _border(self) -> TorchBorder:
        return TorchBorder()

    @property
    def device(self) -> torch.device:
        """Where tensors come out: the CPU."""
        return torch.device("cpu")

    def to(self, device_or_dtype: torch.dtype | torch.device | str, print_details: bool = True) -> Self:
        """The model itself, if it already is what is asked for; see HookedTransformer.to.

        Args:
            device_or_dtype: What the model is to be.
            print_details: TransformerLens's; changes nothing.

        Raises:
            RuntimeUnavailable: For a GPU that the model does not run on.
            InputError: For another dtype or device.
        """
        _ensure_is(self, device_or_dtype)
        return self

    def cpu(self) -> Self:
        """The model itself: its tensors are on the CPU already."""
        return self.to("cpu")

    def cuda(self, device: int | str | torch.device | None = None) -> Self:
        """``to("cuda")``.

        Args:
            device: A GPU; None for "cuda".

        Raises:
            RuntimeUnavailable: If the model does not run on it.
        """
        return self.to("cuda" if device is None else torch.device(device))

    def eval(self) -> Self:
        """The model itself: there is no dropout to turn off."""
        return self


def _ensure_is(model: _Model, device_or_dtype: torch.dtype | torch.device | str) -> None:
    """Refuses a device or dtype that a model does not have."""
    if isinstance(device_or_dtype, torch.dtype):
        name = str(device_or_dtype).removeprefix("torch.")
        if device_or_dtype == model.cfg.dtype or model.dtype.startswith(name):
            return
        raise InputError(
            f"this model has {model.dtype}, fixed when it is opened: open it with from_pretrained(..., dtype={name!r})."
        )
    kind = torch.device(device_or_dtype).type
    if kind == "cpu" or (kind == "cuda" and model.providers[0].startswith("CUDA")):
        return
    if kind == "cuda":
        raise RuntimeUnavailable(
            f"this session runs on {model.providers[0]}, which is fixed when it is opened: open the model with "
            'from_pretrained(..., providers="cuda").'
        )
    raise InputError(f"graphlens does not run on {kind!r}; it has 'cpu' and 'cuda'.")


def _ensure_frozen(wanted: bool, why: str) -> None:
    """Refuses to train a model."""
    if wanted:
        raise InputError(why)
