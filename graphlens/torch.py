"""The torch face: graphlens.HookedTransformer with torch tensors in and out, sharing memory with the NumPy one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens import hooked_transformer
from graphlens.errors import RuntimeUnavailable

try:
    import torch
except ImportError as error:
    raise RuntimeUnavailable("graphlens.torch needs torch: pip install 'graphlens-onnx[torch]'.") from error

__all__ = ["HookedTransformer"]


class HookedTransformer(hooked_transformer.HookedTransformer):
    """graphlens.HookedTransformer, with tensors: same methods, same numbers, no copies on the CPU.

    It computes no gradients; the model's weights are not torch parameters.
    """

    def _to_user(self, array: npt.NDArray[Any]) -> Any:
        return torch.from_numpy(np.require(array, requirements="W"))

    def _from_user(self, value: Any) -> npt.NDArray[Any]:
        if isinstance(value, np.ndarray):
            return value
        if not isinstance(value, torch.Tensor):
            raise TypeError(type(value).__name__)
        array: npt.NDArray[Any] = value.detach().cpu().numpy()
        return array
