"""Where the parts of a variant lie in its transformers model, and hooks there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from graphlens.export.families import Spec, family_for


def spec_of(model: Any) -> Spec:
    """What a transformers model computes, as its family reads its config."""
    family = family_for({"architectures": [type(model).__name__]})
    assert family is not None
    return family.spec_of(model.config, type(model).__name__)


@contextlib.contextmanager
def editing_z(model: Any, layer: int, edit: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside the ``with`` block, a function changes what attention hands to its output matrix: z [b, p, heads, d_head]."""
    spec = spec_of(model)
    attention = spec.attention
    out = model.get_submodule(f"{spec.blocks}.{layer}.{attention.module}.{attention.out}")

    def hook(module: Any, args: Any) -> Any:
        (z,) = args
        return (edit(z.view(*z.shape[:-1], attention.n_heads, attention.d_head)).reshape(z.shape),)

    handle = out.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
