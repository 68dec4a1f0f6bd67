"""graphlens: transformers as ONNX files whose internals have names, to read, edit and run anywhere."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphlens import attribution as attribution
    from graphlens import deploy as deploy
    from graphlens import interventions as interventions
    from graphlens import metrics as metrics
    from graphlens import patching as patching
    from graphlens import surgery as surgery
    from graphlens import torch as torch
    from graphlens import transformer_lens as transformer_lens
    from graphlens import utils as utils
    from graphlens import views as views
    from graphlens.analysis.attribution_graph import AttributionGraph
    from graphlens.analysis.cache.activation_cache import ActivationCache
    from graphlens.analysis.factored_matrix import FactoredMatrix
    from graphlens.analysis.harvest import Harvest
    from graphlens.analysis.metrics import LogitDiff
    from graphlens.analysis.probe import Probe
    from graphlens.edits.cross_layer import CrossLayerTranscoder
    from graphlens.edits.kinds import Ablate, Patch, Scale, Steer
    from graphlens.edits.sae import Sae
    from graphlens.errors import (
        ExportError,
        GraphlensError,
        HookResultError,
        InputError,
        ModelFileError,
        RunError,
        RuntimeUnavailable,
        StateDictError,
        UnknownHookPoint,
        VerificationError,
    )
    from graphlens.experiments.attribution_graph import attribution_graph
    from graphlens.experiments.drift import drift
    from graphlens.experiments.drift_prompts import drift_prompts
    from graphlens.experiments.feature_search import feature_examples, feature_page
    from graphlens.experiments.harvest import harvest
    from graphlens.experiments.pairs import attribution_pairs, sweep_pairs
    from graphlens.experiments.sae_attribution import feature_attribution
    from graphlens.experiments.sae_scores import sae_scores
    from graphlens.experiments.sweep import sweep
    from graphlens.file.names import get_act_name
    from graphlens.file.version import __version__ as __version__
    from graphlens.model.config import HookedTransformerConfig
    from graphlens.model.hook_point import HookPoint
    from graphlens.model.hooked_encoder import HookedEncoder
    from graphlens.model.hooked_transformer import HookedTransformer
    from graphlens.model.hooked_vit import HookedViT
    from graphlens.model.kv_cache import (
        HookedTransformerKeyValueCache,
        HookedTransformerKeyValueCacheEntry,
        KeyValueCache,
        KeyValueCacheEntry,
        TransformerLensKeyValueCache,
        TransformerLensKeyValueCacheEntry,
    )
    from graphlens.pipelines.adopt import adopt
    from graphlens.pipelines.deploy import bake_model, write_adapter, write_drivable
    from graphlens.pipelines.export import export_model
    from graphlens.pipelines.expose import expose
    from graphlens.pipelines.hub import embedded_model
    from graphlens.surgery.process import process_weights

# Loaded on first use: importing graphlens costs milliseconds.
_DOORS = (
    *("attribution", "deploy", "interventions", "metrics", "patching", "surgery", "torch", "transformer_lens", "utils"),
    "views",
)
_HOMES = {
    "__version__": "graphlens.file.version",
    "ActivationCache": "graphlens.analysis.cache.activation_cache",
    "AttributionGraph": "graphlens.analysis.attribution_graph",
    "HookPoint": "graphlens.model.hook_point",
    "HookedEncoder": "graphlens.model.hooked_encoder",
    "HookedTransformer": "graphlens.model.hooked_transformer",
    "HookedTransformerConfig": "graphlens.model.config",
    "HookedViT": "graphlens.model.hooked_vit",
    "adopt": "graphlens.pipelines.adopt",
    "attribution_graph": "graphlens.experiments.attribution_graph",
    **dict.fromkeys(("bake_model", "write_adapter", "write_drivable"), "graphlens.pipelines.deploy"),
    "CrossLayerTranscoder": "graphlens.edits.cross_layer",
    "drift": "graphlens.experiments.drift",
    "drift_prompts": "graphlens.experiments.drift_prompts",
    "embedded_model": "graphlens.pipelines.hub",
    "export_model": "graphlens.pipelines.export",
    "expose": "graphlens.pipelines.expose",
    **dict.fromkeys(("feature_examples", "feature_page"), "graphlens.experiments.feature_search"),
    "feature_attribution": "graphlens.experiments.sae_attribution",
    "FactoredMatrix": "graphlens.analysis.factored_matrix",
    "harvest": "graphlens.experiments.harvest",
    "Harvest": "graphlens.analysis.harvest",
    **{
        f"{prefix}KeyValueCache{suffix}": "graphlens.model.kv_cache"
        for prefix in ("", "HookedTransformer", "TransformerLens")
        for suffix in ("", "Entry")
    },
    **dict.fromkeys(("Ablate", "Patch", "Steer", "Scale"), "graphlens.edits.kinds"),
    "get_act_name": "graphlens.file.names",
    "LogitDiff": "graphlens.analysis.metrics",
    "Probe": "graphlens.analysis.probe",
    "process_weights": "graphlens.surgery",
    "Sae": "graphlens.edits.sae",
    "sae_scores": "graphlens.experiments.sae_scores",
    "sweep": "graphlens.experiments.sweep",
    **dict.fromkeys(("attribution_pairs", "sweep_pairs"), "graphlens.experiments.pairs"),
    **dict.fromkeys(
        (
            "ExportError",
            "GraphlensError",
            "HookResultError",
            "InputError",
            "ModelFileError",
            "RunError",
            "RuntimeUnavailable",
            "StateDictError",
            "UnknownHookPoint",
            "VerificationError",
        ),
        "graphlens.errors",
    ),
}

__all__ = [
    "Ablate",
    "ActivationCache",
    "AttributionGraph",
    "CrossLayerTranscoder",
    "ExportError",
    "FactoredMatrix",
    "GraphlensError",
    "Harvest",
    "HookPoint",
    "HookResultError",
    "HookedEncoder",
    "HookedTransformer",
    "HookedTransformerConfig",
    "HookedTransformerKeyValueCache",
    "HookedTransformerKeyValueCacheEntry",
    "HookedViT",
    "InputError",
    "KeyValueCache",
    "KeyValueCacheEntry",
    "LogitDiff",
    "ModelFileError",
    "Patch",
    "Probe",
    "RunError",
    "RuntimeUnavailable",
    "Sae",
    "Scale",
    "StateDictError",
    "Steer",
    "TransformerLensKeyValueCache",
    "TransformerLensKeyValueCacheEntry",
    "UnknownHookPoint",
    "VerificationError",
    "adopt",
    "attribution_graph",
    "attribution_pairs",
    "bake_model",
    "drift",
    "drift_prompts",
    "embedded_model",
    "export_model",
    "expose",
    "feature_attribution",
    "feature_examples",
    "feature_page",
    "get_act_name",
    "harvest",
    "process_weights",
    "sae_scores",
    "sweep",
    "sweep_pairs",
    "write_adapter",
    "write_drivable",
]


if not TYPE_CHECKING:  # for type checkers a name that is not above is an error

    def __getattr__(name: str) -> object:
        if name in _HOMES:
            return getattr(importlib.import_module(_HOMES[name]), name)
        if name in _DOORS:
            return importlib.import_module(f"graphlens.{name}")
        raise AttributeError(f"module 'graphlens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_DOORS])
