"""Tensors in and out of a model: over the arrays' own memory on the CPU, with a ``backward()`` where hooks ask for one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch.autograd.function import FunctionCtx

from graphlens.analysis import numerics
from graphlens.analysis.arrays import Array
from graphlens.analysis.numerics import counted_pairs
from graphlens.edits.selection import of_tensor
from graphlens.errors import InputError, warn
from graphlens.model import torch_sampling
from graphlens.model.backward import Seed
from graphlens.model.border import Border
from graphlens.model.hooks import BACKWARD
from graphlens.model.of_transformers import generate_output
from graphlens.model.request import Request
from graphlens.model.runner import Runner
from graphlens.model.sampling import Sampler
from graphlens.model.torch_config import HookedTransformerConfig
from graphlens.model.torch_factored import FactoredMatrix
from graphlens.model.torch_weight import Weight


class _Backward(torch.autograd.Function):
    """Logits whose ``backward()`` runs the gradient graph, and so calls the backward hooks active in the forward."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, logits: torch.Tensor, run: Callable[[Array], None]) -> torch.Tensor:
        ctx.run = run
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None, None]:
        ctx.run(gradients[0].detach().contiguous().cpu().numpy())
        return None, None, None


class _Refused(torch.autograd.Function):
    """Numbers without a gradient, whose ``backward()`` says why there is none."""

    @staticmethod
    def forward(ctx: FunctionCtx, anchor: torch.Tensor, numbers: torch.Tensor, why: str) -> torch.Tensor:
        ctx.why = why
        return numbers.view_as(numbers)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: torch.Tensor) -> tuple[None, None, None]:
        raise InputError(ctx.why)


def _refusing(tensor: torch.Tensor, why: str) -> torch.Tensor:
    """The tensor, with a ``backward()`` that raises InputError."""
    refusing: torch.Tensor = _Refused.apply(torch.zeros((), requires_grad=True), tensor, why)
    return refusing


def _no_way_back(learned: Sequence[str]) -> str:
    """Why no gradient reaches what a hook returned."""
    return (
        f"{learned[0]} returned a tensor that requires a gradient, and none reaches it: the graph runs in ONNX Runtime, outside "
        "torch's autograd. Detach what the hook returns; take gradients at its hook point with model.gradients(tokens, metric, "
        "names) and go on from there with tensor.backward(gradient); or train in torch, with the checkpoint."
    )


@dataclass(frozen=True)
class TorchBorder(Border[torch.Tensor]):
    """Tensors on the CPU, over the same memory as the arrays."""

    backward_later = True

    def to_user(self, array: Array) -> torch.Tensor:
        """A tensor over the array's memory; a copy of an array that is read-only."""
        return torch.from_numpy(np.require(array, requirements="W"))

    def from_user(self, value: object) -> Array:
        """The array of a tensor on any device, over its memory on the CPU; an array as it is."""
        if isinstance(value, np.ndarray):
            return value
        if not isinstance(value, torch.Tensor):
            raise TypeError(type(value).__name__)
        if value.dtype == torch.bfloat16:
            raise InputError("a bfloat16 tensor has no NumPy form: pass value.float().")
        return of_tensor(cast(Any, value), "what was given")

    def toggle_autodiff(self, mode: bool) -> None:
        """``torch.set_grad_enabled(mode)``."""
        torch.set_grad_enabled(mode)

    def weight_to_user(self, array: Array, name: str) -> torch.Tensor:
        """A tensor over the array's memory that refuses to be written into; see ``Weight``."""
        return Weight.of(array, name)

    def factored(self, left: Array, right: Array) -> FactoredMatrix:
        """A FactoredMatrix of tensors."""
        return FactoredMatrix(left, right)

    def wants_gradient(self, value: object) -> bool:
        """True for a tensor that requires a gradient, while grad is enabled."""
        return isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled()

    def computed(self, output: Array, given: Sequence[object], part: str, learned: Sequence[str] = ()) -> torch.Tensor:
        """A tensor, with a ``backward()`` that says why there is none where what was given requires a gradient."""
        tensor = self.to_user(output)
        if learned:
            return _refusing(tensor, _no_way_back(learned))
        if any(map(self.wants_gradient, given)):
            return _refusing(
                tensor,
                f"{part} was called with a tensor that requires a gradient, and gives none back: it runs in ONNX Runtime, not in "
                "torch's autograd. Detach what it is called with, or take gradients with model.gradients(tokens, metric, names).",
            )
        return tensor

    def finish(
        self, output: Array, request: Request, runner: Runner[torch.Tensor], learned: Sequence[str] = ()
    ) -> torch.Tensor:
        """The output as a tensor, with a ``backward()`` where backward hooks are active and grad is enabled.

        Where a hook returned a tensor that requires a gradient, ``backward()`` says why none reaches it.
        """
        tensor = self.to_user(output)
        if learned and runner.hooks.active(dir=BACKWARD):
            warn(_no_way_back(learned))  # backward() calls the backward hooks
        elif learned and torch.is_grad_enabled():
            return _refusing(tensor, _no_way_back(learned))
        if not torch.is_grad_enabled() or not runner.hooks.active(dir=BACKWARD) or request.plan.stop is not None:
            return tensor
        if request.cache is not None:
            raise InputError(
                "backward hooks do not go with a KV cache: gradients are of whole prompts. Leave out past_kv_cache, or run under "
                "torch.no_grad()."
            )
        then = runner.snapshot()
        # Copies: the user may change what was handed in before backward() is called.
        feeds = {
            name: np.array(value) if isinstance(value, np.ndarray) else value for name, value in request.feeds.items()
        }
        kept = replace(request, feeds=feeds)

        def run(gradient: Array) -> None:
            with runner.hooks.only(then.hooks), runner.edits.only(then.interventions), torch.no_grad():
                runner.run_backward(kept, Seed.dense(gradient.astype(runner.config.dtype, copy=False)), ())

        anchor = torch.zeros((), requires_grad=True)
        with_backward: torch.Tensor = _Backward.apply(anchor, tensor, run)
        return with_backward

    def loss(self, result: torch.Tensor, output: Array, request: Request, per_token: bool) -> torch.Tensor:
        """The loss, computed by torch where it has to carry a gradient."""
        if not result.requires_grad:
            return self.to_user(numerics.lm_cross_entropy_loss(output, request.need_tokens(), request.mask, per_token))
        tokens = torch.from_numpy(np.array(request.need_tokens()))
        losses = torch.nn.functional.cross_entropy(result[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        counted = torch.from_numpy(counted_pairs(request.mask, request.shape)).to(losses.dtype)
        losses = losses * counted
        return losses if per_token else losses.sum() / counted.sum()

    def sampler(self, seed: int | None) -> Sampler:
        """torch's draws; see ``torch_sampling.sampler``."""
        return torch_sampling.sampler(seed)

    def generated(self, sequences: torch.Tensor, logits: Sequence[torch.Tensor]) -> object:
        """What transformers' ``generate`` gives, where transformers is installed."""
        found = generate_output(sequences, logits)
        return super().generated(sequences, logits) if found is None else found

    @property
    def config_kind(self) -> type[HookedTransformerConfig]:
        """graphlens.torch.HookedTransformerConfig."""
        return HookedTransformerConfig

    def device_of(self, provider: str) -> str:
        """The CPU, whatever computes them."""
        return "cpu"
