"""Attribution: first-order estimates of patches from gradients, and what components write to the logits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT, as_array
from graphlens.analysis.metrics import LogitDiff, Metric
from graphlens.analysis.result import SweepResult
from graphlens.analysis.sites import Site, Sites, listed
from graphlens.analysis.sources import Source, as_source
from graphlens.edits import gate
from graphlens.errors import InputError, checked_number
from graphlens.experiments.corrupted_run import CorruptedRun, resolved_sites
from graphlens.experiments.logit_direction import LogitDirection, ensure_direct
from graphlens.experiments.sweep import check_processing, collect
from graphlens.experiments.sweep_metrics import Measure
from graphlens.experiments.sweep_run import Done, SweepRun
from graphlens.file.io_names import gradient_output
from graphlens.file.names import JOINT_AXES

if TYPE_CHECKING:
    from graphlens.model.hooked_transformer import HookedTransformer
    from graphlens.model.runner import Runner

_TOKENS_AT_ONCE = 256  # beyond so many a run takes twice the time for twice the tokens
_MOST_TOKENS = 512  # where fewer runs count for more than their time: one of many features has a wide SAE in it


def attribution_patch(
    model: HookedTransformer[Any],
    corrupted_tokens: Any,
    sites: Iterable[Site] | Site | Sites,
    source: Any,
    metric: Measure | Iterable[Measure] | Mapping[str, Measure],
    *,
    steps: int = 0,
    verbose: bool = True,
    **forward_options: Any,
) -> SweepResult:
    """Estimates what ``sweep`` would find, from one forward and backward (attribution patching).

    A site's estimate is the corrupted baseline plus (source - corrupted) . gradient, summed over the site: Nanda 2023,
    Syed et al. 2023. It is an approximation, and poor where the model is far from linear: at saturated attention (whose
    gradient vanishes, so that q and k seem not to matter), at large patches such as the residual stream's first layers,
    and at MLP 0, which acts as a second embedding. ``compare_with_sweep`` measures how far it is off.

    Args:
        model: The model.
        corrupted_tokens: See ``sweep``, as for ``sites`` and ``source``.
        sites: See there.
        source: See there.
        metric: See there; it needs a derivative (see ``model.gradients``). With reduction="none" each prompt has an estimate
            of its own, as far as what is active keeps prompts apart.
        steps: 0 takes the gradient at the corrupted run; else the mean of that many gradients on the straight way to
            the patched activation of the whole hook point, at midpoints (integrated gradients: Sundararajan et al.
            2017), a forward and backward each for every hook point.
        verbose: Whether a terminal shows a progress bar.
        **forward_options: Those of ``forward``.

    Returns:
        The estimated metric of each patched run, with the axes of the sites. Of a quantised model
        ``metadata["straight_through"]`` names what rounds and the gradients passed as if it did not.

    Raises:
        UnknownHookPoint: For a hook point that is not there.
        InputError: For what does not fit the model, the prompts or each other.
    """
    checked_steps(steps)
    places = listed(sites)
    check_processing(model.cfg, source)
    given = as_source(source)

    def start(measures: list[Measure], left: list[int]) -> SweepRun:
        some = [places.sites[i] for i in left]
        return start_attribution(model.runner, corrupted_tokens, some, given, measures, steps, **forward_options)

    return collect(model.runner, places, metric, start, verbose)


def direct_logit_attribution(
    model: HookedTransformer[Any], input: Any, metric: LogitDiff, **forward_options: Any
) -> SweepResult:
    """What each component writes to a logit difference directly: heads, MLPs, embeddings and biases.

    A value is the component's output, centred and divided by the final norm's scale of this run, times the norm's weight
    and the difference of the two tokens' columns of W_U, averaged over the prompts. All values together sum to the metric;
    "bias" is that of all biases. They are direct effects: what later components make of an output does not count. Elhage
    et al. 2021; TransformerLens: ``logit_attrs``.

    Args:
        model: The model.
        input: As in ``forward``.
        metric: The logit difference, with the mean over the prompts.
        **forward_options: Those of ``forward``.

    Returns:
        An axis "component".

    Raises:
        InputError: For another metric, and for a run whose components do not sum to it.
    """
    ensure_direct(metric)
    request = model.runner.whole_prompts(input, **forward_options)
    logits, cache = model.run_with_cache(request.need_tokens(), attention_mask=request.mask)
    plain = as_array(logits)
    stack, labels = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
    read = LogitDirection.of(model.runner, metric, request, np.asarray(cache["ln_final.hook_scale"]))
    metric, batch = read.metric, np.arange(plain.shape[0])
    components = np.asarray(stack)[:, batch, read.positions].astype(np.float64)  # [n, b, D]
    values = (components * read.direction).sum(-1).mean(-1)
    names = list(labels)
    values[names.index("bias")] += read.constant.mean()
    total = float(metric(plain))
    if abs(values.sum() - total) > 1e-2 * max(float(np.abs(values).max()), abs(total)):
        raise InputError(
            f"the components sum to {values.sum():.4g} and the metric is {total:.4g}: interventions, hooks or edits in the file "
            "change the residual stream or the logits on the way. Attribute the run without them."
        )
    metadata = {"model": model.cfg.model_name, "metrics": [metric.name], "total": total}
    return SweepResult(values, ("component",), {"component": names}, {"corrupted": 0.0}, metadata)


def start_attribution(
    runner: Runner[ArrayT],
    corrupted: Any,
    sites: Sequence[Site],
    source: Source,
    metrics: Sequence[Measure],
    steps: int,
    **forward_options: Any,
) -> SweepRun:
    """Begins attribution patching; see ``attribution_patch``.

    Args:
        runner: Runs the model.
        corrupted: The corrupted prompts.
        sites: What is patched.
        source: Where patched values come from.
        metrics: What is measured.
        steps: How many gradients are averaged; 0 takes the one at the corrupted run.
        **forward_options: Those of ``forward``.

    Returns:
        The estimate under way.

    Raises:
        UnknownHookPoint: For a hook point that is not there.
        InputError: For a hook point of integers, and for what does not fit the model, the prompts or each other.
    """
    request = runner.whole_prompts(corrupted, **forward_options)
    refuse_backward_hooks(runner)
    found = resolved_sites(runner, sites)
    entries = runner.engine.hooks(request.plan)
    for site in found:
        if not entries[site.hook].dtype.startswith("float"):
            raise InputError(
                f"{site.hook!r} holds {entries[site.hook].dtype}: there is no gradient with respect to it."
            )
    run = CorruptedRun.of(runner, request, found, source, metrics)
    rounded: dict[str, int] = {}
    under_way = SweepRun.of(run, [], len(found), _estimates(run, steps, rounded))
    under_way.straight_through = rounded
    return under_way


def refuse_backward_hooks(runner: Runner[ArrayT]) -> None:
    """Refuses to run where backward hooks are active, since they would change the gradients that attribution reads.

    Args:
        runner: Runs the model.

    Raises:
        InputError: If a backward hook is active.
    """
    if runner.hooks.active(dir="bwd"):
        raise InputError("attribution takes gradients as they are: leave the block with bwd_hooks first.")


def checked_steps(steps: int) -> int:
    """Checks the number of gradients to average, and returns it.

    Args:
        steps: 0 or more.

    Raises:
        InputError: For anything else.
    """
    return checked_number(steps, "steps", least=0)


def _estimates(run: CorruptedRun, steps: int, rounded: dict[str, int]) -> Iterator[Done]:
    """The estimates, as they are done; ``rounded`` gets what the gradients passed as if it did not round."""
    by_hook: dict[str, list[int]] = {}
    for index, site in enumerate(run.sites):
        by_hook.setdefault(site.hook, []).append(index)
    hooks, metrics, corrupted = list(by_hook), run.measuring.metrics, run.measuring.corrupted
    at_once = [gradients_of(run, hooks, metric, rounded) for metric in metrics] if not steps else None
    for hook in hooks:
        rows = []
        for place, metric in enumerate(metrics):
            if at_once is not None:
                gradient = at_once[place][hook]
            else:
                gradient = averaged_gradients(run, hook, hooks, metric, steps, rounded)
            product = apart(run, hook).astype(np.float64) * gradient
            each = isinstance(metric, Metric) and metric.reduction == "none"
            rows.append(_sums(run, by_hook[hook], product, each) + corrupted[place])
        yield by_hook[hook], rows


def contributions(run: CorruptedRun, hooks: Sequence[str], steps: int, rounded: dict[str, int]) -> Mapping[str, Array]:
    """What each number of some activations adds to a metric, as against what its source puts there, to first order.

    Args:
        run: The run, with what is compared with as its patches, and one metric.
        hooks: The hook points.
        steps: How many gradients are averaged on the way to the source; 0 for the one at the run.
        rounded: Gets what the gradients passed as if it did not round.

    Returns:
        By hook point (activation - source) x gradient, float64, shaped like the activation.

    Raises:
        InputError: For a metric without a derivative, and where backward hooks are active.
    """
    refuse_backward_hooks(run.runner)
    checked_steps(steps)
    metric = run.measuring.metrics[0]
    if not steps:
        gradients = gradients_of(run, hooks, metric, rounded)
    else:
        gradients = {hook: averaged_gradients(run, hook, hooks, metric, steps, rounded, _MOST_TOKENS) for hook in hooks}
    return {hook: -apart(run, hook).astype(np.float64) * gradients[hook] for hook in hooks}


def gradients_of(
    run: CorruptedRun,
    hooks: Sequence[str],
    metric: Measure,
    rounded: dict[str, int],
    graph_of: Sequence[str] = (),
    copies: int = 1,
) -> dict[str, Array]:
    """The gradient of a metric with respect to hook points, in a run with what is active.

    Args:
        run: The corrupted run.
        hooks: The hook points' own names.
        metric: What is differentiated.
        rounded: Gets what the gradients passed as if it did not round.
        graph_of: Hook points whose gradients the graph has besides, so that runs for each of them share a session.
        copies: How many times the prompts are in the run.

    Returns:
        The gradient by hook point; of several copies that of the metric of each, one below the other. A metric of one
        number for each prompt is differentiated for each.
    """
    runner, request = run.runner, run.request
    seed = runner.seed(request, metric, each=True)
    if copies > 1:
        request, seed = request.repeated(copies), seed.repeated(copies)
    ran = runner.run_backward(request, seed, hooks, graph_of=graph_of)
    rounded.update(ran.straight_through)
    return {hook: ran.values[gradient_output(hook)] for hook in hooks}


def averaged_gradients(
    run: CorruptedRun,
    hook: str,
    hooks: Sequence[str],
    metric: Measure,
    steps: int,
    rounded: dict[str, int],
    tokens: int = _TOKENS_AT_ONCE,
) -> Array:
    """The mean of the gradients on the straight way from the corrupted activation to the patched one.

    All hook points share one graph, with a gate and a gradient at each: one session serves them all. It computes every
    gradient in every run, which several steps in one run more than make up for.

    Args:
        run: The corrupted run, with the patched activations.
        hook: The hook point that is patched.
        hooks: All that share the graph.
        metric: What is differentiated.
        steps: How many gradients, 1 or more.
        rounded: Gets what they passed as if it did not round.
        tokens: How many tokens a run has at most, where it may have several steps.

    Returns:
        float64, shaped like the activation.
    """
    base, way = run.activations[hook], apart(run, hook)
    total, at_once = np.zeros(base.shape), _steps_at_once(run, metric, tokens)
    for first in range(0, steps, at_once):
        some = range(first, min(first + at_once, steps))
        values = [np.where(run.changed(hook), base + way * ((step + 0.5) / steps), base) for step in some]
        patch = Site(hook).patch(np.concatenate(values).astype(base.dtype))
        with run.runner.edits.sharing(hooks), run.runner.editing(patch):
            gradient = gradients_of(run, [hook], metric, rounded, graph_of=hooks, copies=len(some))[hook]
        total += gradient.reshape(len(some), *base.shape).sum(0, dtype=np.float64)
    return total / steps


def _steps_at_once(run: CorruptedRun, metric: Measure, tokens: int) -> int:
    """How many steps one run takes: one where it matters to hooks, interventions or the metric which rows it has."""
    alike = isinstance(metric, Metric) and metric.linear and run.runner.active().plain
    return max(1, tokens // (run.batch * run.length)) if alike else 1


def apart(run: CorruptedRun, hook: str) -> Array:
    """What the patch adds to the activation of a hook point; 0 at masked scores, which are -inf in both runs.

    Args:
        run: The corrupted run.
        hook: The hook point's own name.
    """
    with np.errstate(invalid="ignore"):
        return np.where(run.changed(hook), run.patched[hook] - run.activations[hook], 0)


def _sums(run: CorruptedRun, indices: Sequence[int], product: Array, each: bool) -> Array:
    """The sum of a product, shaped like the activation, over each of some sites of one hook point: [site].

    With ``each`` it is that of each prompt: [site, b].
    """
    axes = run.entry(run.sites[indices[0]].hook).axes
    if each and axes[0] in JOINT_AXES:
        if run.batch > 1:
            raise InputError(
                f"{run.sites[indices[0]].hook!r} has prompts and positions in one axis, so that no prompt has an estimate of "
                "its own: take reduction='mean', or one prompt at a time."
            )
        return _sums(run, indices, product, False)[:, None]
    whole_rows = slice(None) if each else 0
    fields = gate.selected_by(axes)
    folded: dict[tuple[int, ...], Array] = {}

    def summed(rest: tuple[int, ...]) -> Array:
        """The product summed over axes of which a site takes all: once for all sites."""
        rest = tuple(axis for axis in rest if axis or not each)
        if rest not in folded:
            folded[rest] = product.sum(rest, keepdims=True, dtype=np.float64)
        return folded[rest]

    found: list[Array] = []
    for index in indices:
        site = run.sites[index]
        at = _plain_index(site, [fields.get(axis) for axis in axes], product.shape)
        if at is not None:  # most sites are one position or one head: no mask is needed
            rest = tuple(axis for axis, place in enumerate(at) if place is None)
            places = (whole_rows, *(0 if place is None else place for place in at[1:]))
            found.append(np.asarray(summed(rest)[places]))
            continue
        chosen = run.chosen(site)
        if chosen is None:
            found.append(np.zeros(run.batch if each else ()))
            continue
        whole = summed(tuple(axis for axis, size in enumerate(chosen.shape) if size == 1))
        chosen = np.broadcast_to(chosen, whole.shape)
        if each:
            found.append(np.where(chosen, whole, 0).reshape(run.batch, -1).sum(1))
        else:
            found.append(np.asarray(whole[chosen].sum()))
    return np.stack(found)


def _plain_index(site: Site, fields: Sequence[str | None], shape: Sequence[int]) -> list[int | None] | None:
    """The site as an index for each axis (None: all of it); None where it takes more than that, or is not there."""
    selections = {"positions": site.position, "heads": site.head, "dims": site.dims}
    found: list[int | None] = []
    for field, size in zip(fields, shape, strict=True):
        selection = selections.get(field or "")
        if selection is None or (isinstance(selection, int) and -size <= selection < size):
            found.append(selection)
        else:
            return None
    return found
