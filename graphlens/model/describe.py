"""What a model says of itself now: its configuration, and its table of hook points."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from graphlens.analysis.arrays import ArrayT
from graphlens.file.names import axis_sizes
from graphlens.model.config import HookedTransformerConfig, HookPointInfo

if TYPE_CHECKING:
    from graphlens.model.runner import Runner
    from graphlens.views.pages import Report


def config(runner: Runner[ArrayT]) -> HookedTransformerConfig:
    """The configuration of a model that was opened from a file, which follows the model.

    Args:
        runner: Runs the model.
    """
    manifest, border = runner.engine.manifest, runner.border
    architecture = manifest.config
    told = {
        **asdict(architecture),
        "d_vocab_out": architecture.d_vocab_out,
        "device": border.device_of(runner.engine.providers[0]),
        "rotary_base": architecture.rotary_base or 10000,
        "attn_types": None if architecture.attn_types is None else list(architecture.attn_types),
        "tokenizer_name": None if runner.text.own_tokenizer is None else manifest.source,
        "init_weights": False,
    }
    return border.config_kind.of(runner, told)


def hook_points(runner: Runner[ArrayT]) -> HookPointInfo:
    """Every hook point that there is with the flags that are set now and the SAEs: name -> (shape, dtype).

    Args:
        runner: Runs the model.
    """
    sizes = axis_sizes(runner.config)
    info, entries = HookPointInfo(), runner.engine.hooks(runner.plan())
    for name in runner.names():
        entry = entries[name]
        known = entry.sizes(sizes)
        info[name] = (f"[{', '.join(str(known.get(axis, axis)) for axis in entry.axes)}]", entry.dtype)
    return info


def summary(name: str, runner: Runner[ArrayT]) -> str:
    """A model in one line; ``name`` is its class's."""
    cfg = runner.config
    return (
        f"{name}({cfg.model_name!r}: {cfg.n_layers} layers, {cfg.n_heads} heads, d_model {cfg.d_model}, "
        f"{len(runner.names())} hook points)"
    )


def view(name: str, runner: Runner[ArrayT]) -> Report:
    """A model for a notebook: what it is, its hook points and its configuration; ``name`` is its class's."""
    from graphlens.views.pages import report

    return report([hook_points(runner), config(runner)], title=summary(name, runner))
