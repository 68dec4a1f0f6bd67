"""The torch face: graphlens.HookedTransformer with torch tensors in and out, sharing memory with the NumPy one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from graphlens.analysis import factored_matrix
from graphlens.errors import InputError, RuntimeUnavailable
from graphlens.file.io_names import DENSE, SEED
from graphlens.model import hooked_transformer
from graphlens.model.backward import Seed


class FactoredMatrix:
    """graphlens's FactoredMatrix with tensors in and out: the same attributes and methods."""

    def __init__(self, A: Any, B: Any) -> None:  # noqa: N803
        self._arrays = factored_matrix.FactoredMatrix(A, B)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value = getattr(self._arrays, name)
        return (lambda *args, **options: _tensors(value(*args, **options))) if callable(value) else _tensors(value)

    def __matmul__(self, other: Any) -> Any:
        return _tensors(self._arrays @ getattr(other, "_arrays", other))

    def __rmatmul__(self, other: Any) -> Any:
        return _tensors(self._arrays.__rmatmul__(other))

    def __mul__(self, scalar: Any) -> Any:
        return _tensors(self._arrays * scalar)

    __rmul__ = __mul__

    def __getitem__(self, idx: Any) -> Any:
        return _tensors(self._arrays[idx])

    def __len__(self) -> int:
        return len(self._arrays)

    def __iter__(self) -> Iterator[Any]:
        return map(_tensors, self._arrays)

    def __repr__(self) -> str:
        return repr(self._arrays)


def _tensors(value: Any) -> Any:
    if isinstance(value, factored_matrix.FactoredMatrix):
        return FactoredMatrix(value.A, value.B)
    if isinstance(value, tuple):
        return value if all(isinstance(size, int) for size in value) else tuple(map(_tensors, value))
    return torch.from_numpy(np.require(value, requirements="W")) if isinstance(value, np.ndarray) else value


class _Backward(torch.autograd.Function):
    """Logits whose ``backward()`` runs the gradient graph, and so calls the backward hooks that stood in the forward."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, logits: torch.Tensor, run: Any) -> torch.Tensor:
        ctx.run = run
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None, None]:
        ctx.run(gradients[0].detach().contiguous().cpu().numpy())
        return None, None, None


class HookedTransformer(hooked_transformer.HookedTransformer):
    """graphlens.HookedTransformer, with tensors: same methods, same numbers, no copies on the CPU.

    Tensors come out on the CPU, whatever device the session runs on (see ``providers``); those handed in may be
    anywhere. Where backward hooks stand and grad is enabled, logits and a loss have a ``backward()`` that calls them (it
    runs the forward once more, forward hooks included); no other tensor carries a gradient. Weights are plain tensors:
    editing one in place changes what later reads of the weights give, never the model.
    """

    def _to_user(self, array: npt.NDArray[Any]) -> Any:
        return torch.from_numpy(np.require(array, requirements="W"))

    def _weight_to_user(self, array: npt.NDArray[Any]) -> Any:
        array = array.view()
        try:
            array.flags.writeable = True  # the mapping is copy-on-write: the file stays as it is
        except ValueError:  # it could only be mapped read-only
            array = array.copy()
        return torch.from_numpy(array)

    def _factored(self, left: npt.NDArray[Any], right: npt.NDArray[Any]) -> Any:
        return FactoredMatrix(left, right)

    def _from_user(self, value: Any) -> npt.NDArray[Any]:
        if isinstance(value, np.ndarray):
            return value
        if not isinstance(value, torch.Tensor):
            raise TypeError(type(value).__name__)
        if value.dtype == torch.bfloat16:
            raise InputError("a bfloat16 tensor has no NumPy form: pass value.float().")
        array: npt.NDArray[Any] = value.detach().cpu().numpy()
        return array

    _backward_later = True

    def _output_to_user(self, output: npt.NDArray[Any], request: Any) -> Any:
        tensor = self._to_user(output)
        if not torch.is_grad_enabled() or not self._hooks.standing(dir="bwd") or request.plan.stop is not None:
            return tensor
        if request.cache is not None:
            raise InputError(
                "backward hooks do not go with a KV cache: gradients are of whole prompts. Leave out past_kv_cache, or run under "
                "torch.no_grad()."
            )
        hooks, standing = self._hooks.snapshot(), self._standing.get()
        # Of its own: what was handed in may change before backward() is called.
        feeds = {
            name: np.array(value) if isinstance(value, np.ndarray) else value for name, value in request.feeds.items()
        }
        kept = replace(request, feeds=feeds)

        def run(gradient: npt.NDArray[Any]) -> None:
            token = self._standing.set(standing)
            try:
                with self._hooks.standing_again(hooks), torch.no_grad():
                    self._execute_gradients(kept, (), (), Seed(DENSE, {SEED: gradient}), output=False)
            finally:
                self._standing.reset(token)

        anchor = torch.zeros((), requires_grad=True)
        return _Backward.apply(anchor, tensor, run)

    def _loss_to_user(self, result: Any, output: Any, request: Any, per_token: bool) -> Any:
        if not result.requires_grad:
            return super()._loss_to_user(result, output, request, per_token)
        tokens = torch.from_numpy(np.array(request.tokens))
        losses = torch.nn.functional.cross_entropy(result[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        counted = torch.ones_like(losses)
        if request.mask is not None:
            mask = torch.from_numpy(request.mask) != 0
            counted = (mask[:, :-1] & mask[:, 1:]).to(losses.dtype)
        losses = losses * counted
        return losses if per_token else losses.sum() / counted.sum()

    @property
    def cfg(self) -> Any:
        """The configuration as TransformerLens code reads it: ``dtype`` is a torch.dtype, ``device`` where tensors are."""
        cfg = super().cfg
        return replace(cfg, device="cpu", dtype=getattr(torch, cfg.dtype))

    # What a torch module has

    @property
    def device(self) -> torch.device:
        """Where tensors come out: the CPU."""
        return torch.device("cpu")

    def to(self, device_or_dtype: Any, print_details: bool = True) -> Self:
        """The model itself, where it already is what is asked for.

        A session's device and dtype are fixed when it is opened. Raises RuntimeUnavailable for a GPU that it does not
        run on, InputError for another dtype or device.
        """
        if isinstance(device_or_dtype, torch.dtype):
            name = str(device_or_dtype).removeprefix("torch.")
            if device_or_dtype == self.cfg.dtype or self.dtype.startswith(name):
                return self
            raise InputError(
                f"this model has {self.dtype}, fixed when it is opened: open it with from_pretrained(..., dtype={name!r})."
            )
        kind = torch.device(device_or_dtype).type
        if kind == "cpu" or (kind == "cuda" and self._on_cuda()):
            return self
        if kind == "cuda":
            raise RuntimeUnavailable(
                f"this session runs on {self.providers[0]}, which is fixed when it is opened: open the model with "
                'from_pretrained(..., providers="cuda").'
            )
        raise InputError(f"graphlens does not run on {kind!r}; it has 'cpu' and 'cuda'.")

    def _on_cuda(self) -> bool:
        return self.providers[0].startswith("CUDA")

    def cpu(self) -> Self:
        """The model itself: its tensors are on the CPU already."""
        return self.to("cpu")

    def cuda(self, device: int | str | torch.device | None = None) -> Self:
        """``to("cuda")``."""
        return self.to("cuda" if device is None else torch.device(device))

    def eval(self) -> Self:
        """The model itself: there is no dropout to turn off."""
        return self

    def train(self, mode: bool = True) -> Self:
        """The model itself for ``mode=False``. Raises InputError otherwise: it does not train."""
        if mode:
            raise InputError("a graphlens model does not train: train the checkpoint, then export it again.")
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """The model itself for ``requires_grad=False``. Raises InputError otherwise: weights have no gradients."""
        if requires_grad:
            raise InputError("the weights of a graphlens model have no gradients.")
        return self
