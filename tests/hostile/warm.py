"""What is done once, before any case is forked: imports, the untouched model, and its right numbers."""

from __future__ import annotations

import functools
import gc
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime

import graphlens
from tests.hostile import files, foreign, specs
from tests.hostile.cases import Case
from tests.hostile.routes import Expected
from tests.hostile.truth import Truth

# Loaded on first use by the library: children would each load them anew.
_LATE = (
    "graphlens.cli.demo", "graphlens.surgery.process", "graphlens.surgery.bake", "graphlens.pipelines.deploy",
    "graphlens.pipelines.cache",
    "graphlens.pipelines.hub", "graphlens.experiments.sweep", "graphlens.experiments.act_patch", "graphlens.metrics",
    "rich.console",
    "rich.table", "rich.panel", "rich.markup", "safetensors.numpy", "tokenizers", "typer.testing", "huggingface_hub",
    "onnx_ir", "graphlens.pipelines.inspect", "graphlens.pipelines.findings", "graphlens.pipelines.expose",
    "graphlens.pipelines.adopt", "graphlens.pipelines.adopt_identities", "graphlens.pipelines.adopt_weights",
    "graphlens.surgery.match", "graphlens.surgery.unfusing.expand",
)  # fmt: skip


@dataclass(frozen=True)
class Warmed:
    """What children inherit.

    Attributes:
        base: The untouched folder.
        expected: Its numbers on every route.
        specs: What specs are played against.
    """

    base: Path
    expected: Expected
    specs: specs.Warm


def _one_thread(make: Callable[[], Any]) -> Callable[[], Any]:
    """Session options without a pool of threads, which would be missing in a forked child."""

    def options() -> Any:
        made = make()
        made.intra_op_num_threads = 1
        made.inter_op_num_threads = 1
        return made

    return options


class _NoTorch:
    """An import hook under which torch and transformers are not installed: an export would take longer than a case may."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"{name} is not for hostile cases", name=name)


@functools.cache
def warmed() -> Warmed:
    """Warms this process, once."""
    sys.meta_path.insert(0, _NoTorch())  # type: ignore[arg-type]
    onnxruntime.SessionOptions = _one_thread(onnxruntime.SessionOptions)
    for name in _LATE:
        importlib.import_module(name)
    base = graphlens.embedded_model()
    truth = Truth(base)
    model = graphlens.HookedTransformer.from_onnx(base, "cpu")
    model.run_with_cache(truth.tokens)
    model.run_with_hooks(truth.tokens, fwd_hooks=[("hook_embed", lambda x, hook: None)])
    model.run_with_interventions(truth.tokens, [graphlens.Ablate("hook_embed", positions=0)])
    expected = Expected.of(truth)
    for hook in specs.spec_edits.HOOKS:
        if truth.values[hook] not in ("input_ids", "logits"):
            truth.overriding(hook)
    gc.collect()
    gc.freeze()  # what is here now is shared with every child, and no collector touches it
    return Warmed(base, expected, specs.Warm(model, truth))


def chosen_cases(everything: bool, name: str | None, group: str | None, every: int) -> list[Case]:
    """The cases that are asked for.

    Args:
        everything: Those of ``--all``; else those of CI.
        name: One case's name, of either.
        group: A text that their names hold.
        every: Every so many-th only.
    """
    every_one, only = everything or name is not None, None if name is None else name.partition("/")[0]
    found = [
        *files.cases(lambda: warmed().expected, every_one, only),
        *foreign.cases(every_one, only),
        *specs.cases(lambda: warmed().specs, every_one, only),
    ]
    if name is not None:
        return [case for case in found if case.id == name]
    return [case for case in found if group is None or group in case.id][::every]
