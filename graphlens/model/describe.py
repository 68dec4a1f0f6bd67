"""What a model says of itself now: its configuration, and its table of hook points."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from graphlens.analysis.arrays import ArrayT
from graphlens.file.names import axis_sizes
from graphlens.model.config import HookedTransformerConfig, HookPointInfo

if TYPE_CHECKING:
    from graphlens.model.runner import Runner


def config(runner: Runner[ArrayT]) -> HookedTransformerConfig:
    """The configuration of a model, with the flags that are set now.

    Args:
        runner: Runs the model.
    """
    manifest, text = runner.engine.manifest, runner.text
    architecture = manifest.config
    if "fold_ln" in manifest.processing and architecture.normalization_type in ("LN", "RMS"):
        architecture = replace(architecture, normalization_type=f"{architecture.normalization_type}Pre")
    flags: dict[str, Any] = dict.fromkeys(runner.flags.names, True)
    return HookedTransformerConfig(
        **{**asdict(architecture), "default_prepend_bos": text.default_prepend_bos},
        device="cuda" if runner.engine.providers[0].startswith("CUDA") else "cpu",
        default_padding_side=text.default_padding_side,
        tokenizer_prepends_bos=None if text.tokenizer is None else text.tokenizer.prepends_bos,
        processing=manifest.processing,
        **flags,
    )


def hook_points(runner: Runner[ArrayT]) -> HookPointInfo:
    """Every hook point that there is with the flags that are set now: name -> (shape, dtype).

    Args:
        runner: Runs the model.
    """
    sizes = {axis: str(size) for axis, size in axis_sizes(runner.config).items()}
    info, entries = HookPointInfo(), runner.engine.hooks(runner.plan())
    for name in runner.names():
        info[name] = (f"[{', '.join(sizes.get(axis, axis) for axis in entries[name].axes)}]", entries[name].dtype)
    return info


def summary(name: str, runner: Runner[ArrayT]) -> str:
    """A model in one line; ``name`` is its class's."""
    cfg = runner.config
    return (
        f"{name}({cfg.model_name!r}: {cfg.n_layers} layers, {cfg.n_heads} heads, d_model {cfg.d_model}, "
        f"{len(runner.names())} hook points)"
    )
