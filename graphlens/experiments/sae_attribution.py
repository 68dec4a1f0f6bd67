"""How much each feature of an SAE adds to a metric: what it writes to the logits, or an estimate by gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT
from graphlens.analysis.metric import Metric
from graphlens.analysis.result import SweepResult
from graphlens.analysis.sites import Site
from graphlens.analysis.sources import SourceInput, as_source
from graphlens.engine.block_layout import ATTN_OUT, MLP_OUT, RESID_MID, RESID_POST, RESID_PRE, Z
from graphlens.errors import InputError, checked_number, is_one_of
from graphlens.experiments.attribution import contributions
from graphlens.experiments.corrupted_run import CorruptedRun
from graphlens.experiments.logit_direction import LogitDirection, ensure_direct
from graphlens.experiments.sae_in_run import InRun, in_run
from graphlens.experiments.sweep import check_processing
from graphlens.experiments.sweep_metrics import Measure, called
from graphlens.file.names import in_block, split_name
from graphlens.file.sae_names import OUTPUT

if TYPE_CHECKING:
    from graphlens.edits.sae import Sae
    from graphlens.model.hooked_transformer import HookedTransformer
    from graphlens.model.request import ForwardOptions, Request
    from graphlens.model.runner import Runner
    from graphlens.model.text import Input

METHODS = ("direct", "patching", "integrated")
_ADDED = (RESID_PRE, RESID_MID, RESID_POST, MLP_OUT, ATTN_OUT)
_SAME = 1e-3  # of the largest number of a residual stream: what a block adds must sum to it


def feature_attribution(
    model: HookedTransformer[ArrayT],
    input: Input[ArrayT],
    metric: Measure,
    sae: Sae | str,
    *,
    method: str = "patching",
    source: SourceInput = "zero",
    steps: int = 8,
    use_error_term: bool | None = None,
    **forward_options: Unpack[ForwardOptions[ArrayT]],
) -> SweepResult:
    """What each feature adds to a metric at each position, for all features at once: 3 runs or fewer, unless many prompts.

    A positive value says that the feature raises the metric: by "patching" and "integrated" a value estimates how much the
    metric would fall if the feature were what ``source`` says instead, by "direct" it is what the feature writes to the logits
    itself, past everything between.

    Args:
        model: The model.
        input: The prompts, as ``forward`` takes them; but a list of texts is padded on the left.
        metric: What is measured. "direct" takes a LogitDiff; the others what has a derivative (see ``model.gradients``).
        sae: An SAE, which is attached for this call; or the hook point that one reads which is attached already.
        method: "direct": activation x (decoder row . what the logit difference reads of the residual stream, through the final
            norm with this run's scale). "patching": (activation - source) x gradient (attribution patching: Nanda 2023, Marks et
            al. 2024). "integrated": the same with the mean of gradients on the straight way to ``source`` (integrated gradients:
            Sundararajan et al. 2017).
        source: What a feature is compared with: "zero", "mean", the cache of another run with its ``hook_sae_acts_post``.
        steps: How many gradients "integrated" averages, at midpoints.
        use_error_term: Whether ``sae`` is attached with its error term; None for True, so that the model computes what it does.
        **forward_options: Those of ``forward``.

    Returns:
        Axes "position" and "feature", averaged over the prompts as the metric is. "direct" is 0 where the metric does not read.

    Raises:
        UnknownHookPoint: The model lacks a hook point of the SAE's, or the cache has not its features.
        InputError: For what does not fit, a metric without a derivative, and with "direct" for an SAE whose output is not added
            to the residual stream.
    """
    if not is_one_of(method, METHODS):
        raise InputError(f"method={method!r}: there are {', '.join(map(repr, METHODS))}.")
    steps = checked_number(steps, "steps", least=1)
    check_processing(model.cfg, source)
    given = as_source(source)
    runner = model.runner
    with in_run(model, sae, use_error_term) as (one,):
        request = runner.whole_prompts(input, **forward_options)
        metadata: dict[str, object] = {"model": model.cfg.model_name, "method": method, "hook": one.features}
        if method == "direct":
            values, name = _direct(runner, request, ensure_direct(metric), one)
        else:
            run = CorruptedRun.of(runner, request, [Site(one.features)], given, [metric])
            rounded: dict[str, int] = {}
            found = contributions(run, [one.features], steps if method == "integrated" else 0, rounded)
            values, bound = found[one.features].sum(0), run.measuring.metrics[0]
            name = bound.name if isinstance(bound, Metric) else called(bound)
            if rounded:
                metadata["straight_through"] = rounded
    labels = {"position": [str(p) for p in range(len(values))], "feature": [str(f) for f in one.numbers]}
    return SweepResult(values, ("position", "feature"), labels, {"corrupted": 0.0}, {**metadata, "metrics": [name]})


def _direct(runner: Runner[ArrayT], request: Request, metric: Measure, one: InRun) -> tuple[Array, str]:
    """What features write to a logit difference by themselves [p, d_sae], and the metric's name."""
    metric = ensure_direct(metric)
    layer, rest = split_name(one.spliced.writes)
    if layer is None or rest not in (*_ADDED, Z):
        raise InputError(
            f"{one.spliced.writes!r} is not added to the residual stream, so its features write nothing to the logits directly. "
            "Take method='patching'."
        )
    if runner.config.normalises_residual:
        raise InputError(
            f"{runner.config.model_name} normalises its residual stream after each sublayer, so nothing is written to the logits "
            "directly. Take method='patching'."
        )
    sums = _summed(runner, layer, rest)
    scale_hook = "ln_final.hook_scale"
    fetch = [one.features, one.input, *((scale_hook,) if scale_hook in runner.engine.hook_names else ()), *sums]
    ran = runner.run(request, fetch, output=False)
    if sums:
        *written, end = (ran.values[name] for name in sums)
        _ensure_summed(one, written, end)
    rows = np.arange(request.shape[0])
    read = LogitDirection.of(
        runner, metric, request, ran.values.get(scale_hook, np.ones((*request.shape, 1), np.float32))
    )
    seen = read.direction
    if rest == Z:  # what a head's z is worth, through W_O
        seen = np.einsum("hdm,bm->bhd", np.asarray(runner.weights[in_block(layer, "attn.W_O")], np.float64), seen)
        seen = seen.reshape(len(rows), -1)
    each = one.sae.directions @ seen.T.astype(np.float32)  # [d_sae, b]
    scale = one.sae.output_scale(ran.values[one.input][rows, read.positions])
    acts = ran.values[one.features][rows, read.positions].astype(np.float64) * each.T
    acts = acts if scale is None else acts * scale
    if one.spliced.excluded:
        acts[np.isin(request.need_tokens()[rows, read.positions], one.spliced.excluded)] = 0
    values = np.zeros((request.shape[1], acts.shape[1]))
    np.add.at(values, read.positions, acts / len(rows))
    return values, read.metric.name


def _summed(runner: Runner[ArrayT], layer: int, rest: str) -> list[str]:
    """What a block adds and what comes of it, as hook points; none for an SAE of the stream itself."""
    if rest not in (MLP_OUT, ATTN_OUT, Z):
        return []
    there, names = set(runner.names()), [in_block(layer, name) for name in (RESID_PRE, ATTN_OUT, MLP_OUT)]
    carried = [f"{name}.{OUTPUT}" if f"{name}.{OUTPUT}" in there else name for name in names]
    return [*(name for name in carried if name in there), in_block(layer, RESID_POST)]


def _ensure_summed(one: InRun, written: Sequence[Array], end: Array) -> None:
    """Raises InputError unless a block adds what its sublayers write to the stream as it is."""
    if np.abs(sum(written) - end).max() > _SAME * np.abs(end).max():
        raise InputError(
            f"what is at {one.spliced.writes!r} is not added to the residual stream as it is (a norm or a factor comes between). "
            "Take method='patching'."
        )
