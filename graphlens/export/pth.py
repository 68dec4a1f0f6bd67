"""Reading a state dict that torch saved, without running any of the code that such a file may hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from graphlens.errors import ExportError
from graphlens.file.safetensors import Array


def load_pth(path: Path) -> dict[str, Array]:
    """The tensors of a ``.pth`` file, read by ``torch.load(weights_only=True)`` and in no other way.

    Args:
        path: The file.

    Returns:
        Name -> array; those of floats in float32.

    Raises:
        ExportError: The file is damaged, or holds anything else than a dict of names and tensors.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # of damaged bytes the unpickler makes errors of any kind, struct.error and IndexError too
        said = (str(error).strip().splitlines() or [""])[0]
        raise ExportError(
            f"{path}: torch.load(weights_only=True) refuses this file ({said:.200}). It is damaged, or holds more than tensors, "
            "which could run code: graphlens loads it in no other way."
        ) from error
    named = isinstance(found, Mapping) and all(isinstance(name, str) for name in found)
    if not named or not all(isinstance(value, torch.Tensor) and _is_plain(value) for value in found.values()):
        raise ExportError(f"{path}: holds no dict of names and tensors, so it is no state dict.")
    tensors = {name: value.detach() for name, value in found.items()}
    return {name: (value.float() if value.is_floating_point() else value).numpy() for name, value in tensors.items()}


def _is_plain(tensor: torch.Tensor) -> bool:
    """True for a tensor that is an array of numbers: not sparse, not quantised, with memory of its own."""
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
