"""Where a graphlens model can run, by the names that TransformerLens's scripts ask with."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from graphlens.runtime.providers import CUDA, onnxruntime

if TYPE_CHECKING:
    from graphlens.model.config import HookedTransformerConfig
    from graphlens.model.torch_face import HookedTransformer


def get_device() -> str:
    """The device that a model runs on unless it is told: "cuda" if torch sees a GPU and ONNX Runtime can use it, else "cpu".

    Returns:
        "cuda" or "cpu"; never "mps", which graphlens does not run on.

    Raises:
        RuntimeUnavailable: ONNX Runtime is not installed.
    """
    return "cuda" if torch.cuda.is_available() and CUDA in onnxruntime().get_available_providers() else "cpu"


def warn_if_mps(device: str | torch.device) -> None:
    """Warns that graphlens does not run on Apple's MPS, if a device is that.

    Args:
        device: A device.
    """
    if torch.device(device).type == "mps":
        warnings.warn("graphlens does not run on MPS: its models run on the CPU.", UserWarning, stacklevel=2)


def print_gpu_mem(step_name: str = "") -> None:
    """Prints how much of the GPU's memory torch's tensors take; ONNX Runtime's is its own.

    Args:
        step_name: What the line begins with.
    """
    held = torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    print(f"{step_name} ~ {held:.2f} GiB allocated on GPU.")


def move_to_and_update_config(
    model: HookedTransformer, device_or_dtype: torch.device | str | torch.dtype, print_details: bool = True
) -> HookedTransformer:
    """``model.to(...)``: the model itself, if it is there already.

    Args:
        model: The model.
        device_or_dtype: What it is to be.
        print_details: Changes nothing: nothing moves.

    Raises:
        InputError: It is not; see HookedTransformer.to.
        RuntimeUnavailable: For a GPU that it does not run on.
    """
    return model.to(device_or_dtype, print_details)


def get_device_for_block_index(
    index: int, cfg: HookedTransformerConfig, device: torch.device | str | None = None
) -> torch.device:
    """The device of a block's tensors: all blocks have the model's.

    Args:
        index: The block.
        cfg: The model's configuration.
        device: Another device to take in place of the model's; None for that.
    """
    return torch.device(cfg.device if device is None else device)


def get_best_available_device(cfg: HookedTransformerConfig | None = None) -> torch.device:
    """``get_device()`` as a torch.device.

    Args:
        cfg: Changes nothing: a model runs on one device.

    Raises:
        RuntimeUnavailable: ONNX Runtime is not installed.
    """
    return torch.device(get_device())
