"""graphlens: transformers as ONNX files whose internals have names, to read, edit and run anywhere."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphlens.analysis.activation_cache import ActivationCache
    from graphlens.errors import (
        ExportError,
        GraphlensError,
        HookResultError,
        InputError,
        ModelFileError,
        RuntimeUnavailable,
        UnknownHookPoint,
        VerificationError,
    )
    from graphlens.exporter import export_model
    from graphlens.hook_points import get_act_name
    from graphlens.hooked_transformer import HookedTransformer
    from graphlens.hub import embedded_model

__version__ = "0.1.0"

# Loaded on first use: importing graphlens costs milliseconds.
_HOMES = {
    "ActivationCache": "graphlens.analysis.activation_cache",
    "HookedTransformer": "graphlens.hooked_transformer",
    "embedded_model": "graphlens.hub",
    "export_model": "graphlens.exporter",
    "FactoredMatrix": "graphlens.analysis.factored_matrix",
    "KeyValueCache": "graphlens.kv_cache",
    "get_act_name": "graphlens.hook_points",
    "process_weights": "graphlens.surgery",
    **dict.fromkeys(
        (
            "ExportError",
            "GraphlensError",
            "HookResultError",
            "InputError",
            "ModelFileError",
            "RuntimeUnavailable",
            "UnknownHookPoint",
            "VerificationError",
        ),
        "graphlens.errors",
    ),
}

__all__ = [
    "ActivationCache",
    "ExportError",
    "FactoredMatrix",
    "GraphlensError",
    "HookResultError",
    "HookedTransformer",
    "InputError",
    "KeyValueCache",
    "ModelFileError",
    "RuntimeUnavailable",
    "UnknownHookPoint",
    "VerificationError",
    "embedded_model",
    "export_model",
    "get_act_name",
    "process_weights",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'graphlens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
