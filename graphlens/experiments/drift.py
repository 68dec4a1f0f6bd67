"""Drift: how far a model's activations are from another's, which step adds how much, and what it costs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from graphlens.analysis.arrays import ArrayT
from graphlens.analysis.drift_result import DriftResult
from graphlens.errors import InputError, checked_number
from graphlens.experiments.drift_comparison import Comparison
from graphlens.experiments.drift_costs import Costs, patchable
from graphlens.experiments.drift_run import OtherT, Side, ensure_one_shape, requests
from graphlens.experiments.sweep_metrics import Measure
from graphlens.model.text import Input
from graphlens.views.progress import steps

if TYPE_CHECKING:
    from graphlens.model.hooked_encoder import HookedEncoder
    from graphlens.model.hooked_transformer import HookedTransformer


def drift(
    reference: HookedTransformer[ArrayT] | HookedEncoder[ArrayT],
    other: HookedTransformer[OtherT] | HookedEncoder[OtherT],
    tokens: Input[ArrayT],
    *,
    patch: bool = False,
    top: int | None = None,
    metric: Measure | None = None,
    verbose: bool = True,
    **forward_options: object,
) -> DriftResult:
    """How far a model's activations are from a reference's, at each hook point that both have.

    The two are versions of one model: float32 and int8, a base and its fine-tune, the files of two exporters. For each hook
    point the result has

    - ``relative``, ``cosine`` and ``snr``: all the error that is there;
    - ``fresh``: the error that this step adds. It is the relative error of what the other model computes at the hook point in a
      run in which every hook point before it holds the reference's activation. So a hook point's step is what lies between
      it and the nearest hook points before it, and an error shows where it comes in and nowhere after.

    Three forwards are made, one of the reference and two of the other model, side by side, so that no more than a layer's
    activations are held. Masked attention scores and padding do not count; where the reference's activations are put in, they
    stay the other model's. What is active on the two models (hooks, interventions, flags, weights set) counts.

    With ``patch`` the reference's activation is then put into the other model's plain run at one site after the other, each
    in a forward from its layer on, and ``recovered`` says how much of the logits' error goes away. Sites that add no error are
    left out, and so are hook points that hold all of the residual stream: a patch there takes away the error of everything
    before. For ``unembed.hook_out`` it is what goes away when the unembedding's own error is taken off the logits.

    Args:
        reference: The model that counts as right.
        other: The model that is compared with it.
        tokens: Text or tokens [b, p], as ``forward`` takes them; text is read by the reference's tokenizer. Images of a vision
            model.
        patch: Whether to put activations in.
        top: At how many sites: those with the most fresh error. None is all.
        metric: What else to measure with ``patch``: one of graphlens.metrics, or a function of logits [b, p, V] to a number.
        verbose: Whether a terminal shows a progress bar.
        **forward_options: Those of ``forward``: attention_mask, prepend_bos, padding_side; token_type_ids of an encoder.

    Returns:
        The figures of each hook point, in firing order.

    Raises:
        InputError: For two models of different shape, for prompts that do not fit, and for ``top`` or ``metric`` without
            ``patch``.
        RuntimeUnavailable: Without the package for Python hooks.
    """
    if not patch and (top is not None or metric is not None):
        raise InputError("top and metric belong to patch=True: without it nothing is put in.")
    top = None if top is None else checked_number(top, "top", least=1)
    ensure_one_shape(reference.runner, other.runner)
    first, second = requests(reference.runner, other.runner, tokens, forward_options)
    right, wrong = Side(reference.runner, first), Side(other.runner, second)
    comparison = Comparison(right, wrong, keep=patch)
    with steps("Comparing", comparison.count) if verbose else nullcontext(_Silent()) as progress:
        comparison.run(progress)
    result = comparison.result()
    if not patch:
        return result
    costs = Costs(right, wrong, comparison.kept(), metric)
    chosen = patchable(result, top)
    with steps("Patching", len(chosen)) if verbose else nullcontext(_Silent()) as progress:
        found = costs.of(chosen, progress)
    sites = tuple(
        replace(site, recovered=found[site.hook][0], metric=found[site.hook][1]) if site.hook in found else site
        for site in result.sites
    )
    return replace(result, sites=sites, metric=costs.metric, notes=(*result.notes, *costs.notes))


class _Silent:
    """A progress bar that is not shown."""

    def advance(self, count: int = 1) -> None:
        """Does nothing."""
