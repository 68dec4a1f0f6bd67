"""Execution providers: which ones a session is asked for, and whether it really got them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

from graphlens.errors import InputError, RuntimeUnavailable
from graphlens.runtime.types import HasProviders

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_SHORT = {"cpu": [CPU], "cuda": [CUDA, CPU], "gpu": [CUDA, CPU]}
Providers = str | Sequence[str] | None


def onnxruntime() -> ModuleType:
    """The ``onnxruntime`` module, imported on first use.

    Raises:
        RuntimeUnavailable: It is not installed, or two wheels of it overwrote each other. The message says what to do.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise RuntimeUnavailable(
            "ONNX Runtime is not installed. Install one of: pip install 'graphlens-onnx[cpu]' or "
            "pip install 'graphlens-onnx[gpu]' (not both: the two wheels overwrite each other)."
        ) from error
    if not hasattr(ort, "InferenceSession"):
        raise RuntimeUnavailable(
            "ONNX Runtime is installed but broken: onnxruntime and onnxruntime-gpu overwrite each other. "
            "Uninstall both, then install one extra: graphlens-onnx[cpu] or graphlens-onnx[gpu]."
        )
    module: ModuleType = ort
    return module


@lru_cache(maxsize=1)
def preload_cuda() -> None:
    """Loads CUDA's libraries from the wheels that hold them, where this ONNX Runtime can."""
    preload = getattr(onnxruntime(), "preload_dlls", None)
    if preload is not None:
        preload()


def choose_providers(asked: Providers) -> tuple[list[str], bool]:
    """The execution providers to open a session with.

    Args:
        asked: ``"cpu"``, ``"cuda"``, a list of ONNX Runtime's names, or None for CUDA where it works and the CPU
            elsewhere.

    Returns:
        The providers' names, first choice first, and whether the first must be active.

    Raises:
        InputError: There is no provider of that name, or the list is empty.
        RuntimeUnavailable: This ONNX Runtime was built without it.
    """
    available = onnxruntime().get_available_providers()
    if asked is None:
        names, required = ([CUDA, CPU] if CUDA in available else [CPU]), False
    elif isinstance(asked, str):
        short = asked.lower()
        if short not in _SHORT and asked not in onnxruntime().get_all_providers():
            raise InputError(
                f"unknown provider {asked!r}: use 'cpu', 'cuda', or a list of ONNX Runtime provider names."
            )
        names, required = list(_SHORT.get(short, [asked])), True
    else:
        names, required = list(asked), True
        if not names:
            raise InputError("the list of providers is empty: use 'cpu', 'cuda', or ONNX Runtime provider names.")
    known = onnxruntime().get_all_providers()
    for name in names:
        if name not in known:
            raise InputError(f"unknown provider {name!r}. ONNX Runtime knows: {', '.join(known)}.")
        if name not in available:
            extra = " Install the GPU build: pip install 'graphlens-onnx[gpu]'." if name == CUDA else ""
            raise RuntimeUnavailable(
                f"{name} was asked for, and this ONNX Runtime was built without it. It has: {', '.join(available)}.{extra}"
            )
    if CUDA in names:
        preload_cuda()
    return names, required


def with_options(names: Sequence[str]) -> list[str | tuple[str, dict[str, str]]]:
    """Execution providers as a session is asked for them, with what makes their numbers those of other runtimes.

    Args:
        names: The providers' names.

    Returns:
        The same, and for CUDA its options: float32 products are computed in float32. By default ONNX Runtime rounds their
        operands to TensorFloat-32 on cards that can, which has 10 bits of a float32's 23: logits then differ by 1e-3.
    """
    return [(name, {"use_tf32": "0"}) if name == CUDA else name for name in names]


def require_active(session: HasProviders, names: Sequence[str]) -> None:
    """Checks that a session got the provider that was asked for first. ONNX Runtime itself only warns and falls back.

    Raises:
        RuntimeUnavailable: That provider is not active.
    """
    active = session.get_providers()
    if names[0] not in active:
        raise RuntimeUnavailable(
            f"{names[0]} was asked for and is not active; ONNX Runtime fell back to {', '.join(active)}. For CUDA, check "
            "the driver (nvidia-smi) and that CUDA and cuDNN match this onnxruntime-gpu; its own message is on stderr."
        )
