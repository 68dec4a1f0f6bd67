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
    from graphlens.interventions import Ablate, Patch, Scale, Steer

__version__ = "0.1.0"

# Loaded on first use: importing graphlens costs milliseconds.
_HOMES = {
    "ActivationCache": "graphlens.analysis.activation_cache",
    "HookedTransformer": "graphlens.hooked_transformer",
    **dict.fromkeys(("bake_model", "write_adapter", "write_drivable"), "graphlens.deploy"),
    "embedded_model": "graphlens.hub",
    "export_model": "graphlens.exporter",
    "FactoredMatrix": "graphlens.analysis.factored_matrix",
    **dict.fromkeys(
        ("KeyValueCache", "HookedTransformerKeyValueCache", "TransformerLensKeyValueCache"), "graphlens.kv_cache"
    ),
    **dict.fromkeys(("Ablate", "Patch", "Steer", "Scale"), "graphlens.interventions"),
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
    "Ablate",
    "ActivationCache",
    "ExportError",
    "FactoredMatrix",
    "GraphlensError",
    "HookResultError",
    "HookedTransformer",
    "HookedTransformerKeyValueCache",
    "InputError",
    "KeyValueCache",
    "ModelFileError",
    "Patch",
    "RuntimeUnavailable",
    "Scale",
    "Steer",
    "TransformerLensKeyValueCache",
    "UnknownHookPoint",
    "VerificationError",
    "bake_model",
    "embedded_model",
    "export_model",
    "get_act_name",
    "process_weights",
    "write_adapter",
    "write_drivable",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'graphlens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
