"""Sparse feature circuits: scores of features and errors of several SAEs, and runs in which only a circuit of them is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Unpack

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT
from graphlens.analysis.feature_scores import FeatureCircuit, FeatureScores
from graphlens.analysis.metric import Metric
from graphlens.analysis.result import SweepResult
from graphlens.analysis.sites import Site
from graphlens.analysis.sources import SourceInput, as_source
from graphlens.edits.kinds import Intervention, Scale, Steer
from graphlens.errors import InputError
from graphlens.experiments.attribution import contributions
from graphlens.experiments.corrupted_run import CorruptedRun
from graphlens.experiments.sae_in_run import InRun, in_run
from graphlens.experiments.sweep import check_processing
from graphlens.experiments.sweep_metrics import Measure, called

if TYPE_CHECKING:
    from graphlens.edits.sae import Sae
    from graphlens.model.hooked_transformer import HookedTransformer
    from graphlens.model.request import ForwardOptions
    from graphlens.model.text import Input

CURVES = ("faithfulness", "completeness")


def feature_scores(
    model: HookedTransformer[ArrayT],
    input: Input[ArrayT],
    metric: Measure,
    saes: Sequence[Sae | str] | Sae | str,
    *,
    source: SourceInput = "zero",
    steps: int = 0,
    by_position: bool = True,
    **forward_options: Unpack[ForwardOptions[ArrayT]],
) -> FeatureScores:
    """Scores every feature and every error of several SAEs by what it adds to a metric, all of them from one backward.

    A score is (activation - source) x gradient, in a run with all of the SAEs and their error terms, which computes what the
    model does (Marks et al. 2024). An error's is summed over its numbers.

    Args:
        model: The model.
        input: The prompts, as ``forward`` takes them; but a list of texts is padded on the left.
        metric: What is measured; it needs a derivative.
        saes: The SAEs, which are attached for this call; or the hook points of some that are attached with their error terms.
        source: What nodes are compared with: "zero", "mean", or the cache of another run with these SAEs.
        steps: How many gradients are averaged on the way to the source, for each SAE's features and each one's errors apart; 0
            takes the gradient at the run.
        by_position: True for a node for each position; False sums scores over positions.
        **forward_options: Those of ``forward``.

    Returns:
        The scores; ``.top(20)`` lists the largest, ``.circuit(threshold)`` takes those that are large enough.

    Raises:
        UnknownHookPoint: The model lacks a hook point of an SAE's, or the cache has not its values.
        InputError: For an SAE that is attached without its error term, and for what does not fit the model or the prompts.
    """
    check_processing(model.cfg, source)
    with in_run(model, saes) as found:
        hooks = [hook for one in found for hook in (one.features, _error(one))]
        run = _run(model, input, metric, hooks, source, forward_options)
        each = contributions(run, hooks, steps, {})
    features, errors = {}, {}
    for one in found:
        scores = each[one.features].sum(0)
        error = each[_error(one)]
        summed = error.sum(tuple(range(2, error.ndim))).sum(0)
        features[one.spliced.writes] = scores if by_position else scores.sum(0, keepdims=True)
        errors[one.spliced.writes] = summed if by_position else summed.sum(0, keepdims=True)
    bound = run.measuring.metrics[0]
    return FeatureScores(
        features,
        errors,
        {one.spliced.writes: one.numbers for one in found},
        by_position,
        float(run.measuring.corrupted[0]),
        model.cfg.model_name,
        bound.name if isinstance(bound, Metric) else called(bound),
    )


def circuit_curves(
    model: HookedTransformer[ArrayT],
    input: Input[ArrayT],
    metric: Measure,
    saes: Sequence[Sae | str] | Sae | str,
    circuits: Mapping[str, FeatureCircuit] | Mapping[int, FeatureCircuit] | Mapping[float, FeatureCircuit],
    *,
    source: SourceInput = "mean",
    **forward_options: Unpack[ForwardOptions[ArrayT]],
) -> SweepResult:
    """How much of a metric is left when every node outside of a circuit is ablated, and when every node inside is.

    With m of all nodes, of none, and of those left, both are (m(left) - m(none)) / (m(all) - m(none)) (Marks et al. 2024).
    Faithfulness leaves the circuit, and is 1 where it does what the model does; completeness leaves all the rest, and is 0 where
    nothing of it is outside. Nodes that are left compute what follows from the others in that run: two runs for each circuit.

    Args:
        model: The model.
        input: The prompts; see ``feature_scores``.
        metric: What is measured, one number.
        saes: See there.
        circuits: Circuits of these SAEs by name; numbers of nodes or thresholds, say.
        source: What an ablated node is put to: "mean" over prompts and positions, "zero", or the cache of another run.
        **forward_options: Those of ``forward``.

    Returns:
        Axes "curve" ("faithfulness", "completeness") and "circuit". ``metadata`` has the metric of all nodes ("all") and of none
        ("none").

    Raises:
        UnknownHookPoint: See ``feature_scores``.
        InputError: For circuits of other SAEs or of other prompts, for a metric of several numbers, and where ablating all nodes
            does not change the metric.
    """
    if not isinstance(circuits, Mapping) or not circuits:
        raise InputError(
            "circuits maps names to circuits: {100: scores.circuit(n=100)}, say; there is none to measure."
        )
    if isinstance(metric, Metric) and metric.reduction != "mean":
        raise InputError(f"{metric!r} is a number for each prompt; a curve is of one: reduction='mean'.")
    check_processing(model.cfg, source)
    with in_run(model, saes) as found:
        hooks = [hook for one in found for hook in (one.features, _error(one))]
        run = _run(model, input, metric, hooks, source, forward_options)
        for name, circuit in circuits.items():
            _ensure_of(name, circuit, found, run)
        nothing = FeatureCircuit(
            {one.spliced.writes: np.zeros((1, len(one.numbers)), bool) for one in found},
            {one.spliced.writes: np.zeros(1, bool) for one in found},
            {one.spliced.writes: one.numbers for one in found},
            False,
        )
        every, none = float(run.measuring.corrupted[0]), _left(run, found, nothing)
        if every == none:
            raise InputError("ablating every node leaves the metric as it is: there is nothing to share out.")
        values = np.array(
            [[_left(run, found, c if i == 0 else c.without()) for c in circuits.values()] for i in range(len(CURVES))]
        )
    labels = {"curve": CURVES, "circuit": [str(name) for name in circuits]}
    metadata = {"model": model.cfg.model_name, "all": every, "none": none}
    return SweepResult(
        (values - none) / (every - none), ("curve", "circuit"), labels, {"corrupted": 0.0, "clean": 1.0}, metadata
    )


def _run(
    model: HookedTransformer[ArrayT],
    input: Input[ArrayT],
    metric: Measure,
    hooks: Sequence[str],
    source: SourceInput,
    forward_options: ForwardOptions[ArrayT],
) -> CorruptedRun:
    """The run with the SAEs, and what its nodes are compared with."""
    if isinstance(metric, (list, tuple, dict)):
        raise InputError("features are scored by one metric, not by several.")
    request = model.runner.whole_prompts(input, **forward_options)
    return CorruptedRun.of(model.runner, request, [Site(hook) for hook in hooks], as_source(source), [metric])


def _error(one: InRun) -> str:
    """The hook point of an SAE's error. Raises InputError for one without."""
    if one.error is None:
        raise InputError(
            f"the SAE at {one.spliced.hook!r} is attached without its error term, which is a node of a circuit: "
            "use_error_term=True."
        )
    return one.error


def _ensure_of(name: object, circuit: FeatureCircuit, found: Sequence[InRun], run: CorruptedRun) -> None:
    """Raises InputError for a circuit of other SAEs, or of prompts of another length."""
    if not isinstance(circuit, FeatureCircuit):
        raise InputError(f"circuit {name!r} is {type(circuit).__name__}: take scores.circuit(...).")
    wanted = {one.spliced.writes: tuple(one.numbers) for one in found}
    if {hook: tuple(numbers) for hook, numbers in circuit.numbers.items()} != wanted:
        raise InputError(
            f"circuit {name!r} is of SAEs at {', '.join(circuit.features)}, and those given are at {', '.join(wanted)}."
        )
    lengths = {len(mask) for mask in circuit.features.values()} - {1}
    if lengths - {run.length}:
        raise InputError(f"circuit {name!r} is of prompts of {lengths.pop()} positions, and these have {run.length}.")


def _left(run: CorruptedRun, found: Sequence[InRun], circuit: FeatureCircuit) -> float:
    """The metric of a run in which the nodes outside of a circuit are ablated."""
    edits: list[Intervention] = []
    for one in found:
        hook = one.spliced.writes
        edits += _ablating(run, one.features, circuit.features[hook][None])
        mask = circuit.errors[hook]
        edits += _ablating(run, _error(one), mask.reshape(1, -1, *(1,) * (run.activations[_error(one)].ndim - 2)))
    with run.runner.editing(edits):
        logits = run.runner.run(run.request).logits
    return float(run.measuring.of(run.measuring.metrics[0], logits))


def _ablating(run: CorruptedRun, hook: str, left: Array) -> list[Intervention]:
    """The edits that put what is not left at a hook point to what the source says."""
    put = np.where(left, 0, run.patched[hook]).astype(np.float32)
    scale = np.broadcast_to(left, (1, run.length, *left.shape[2:])).astype(np.float32)
    found: list[Intervention] = [Scale(hook, scale)]
    if put.any():
        found.append(Steer(hook, np.broadcast_to(put, (len(put), run.length, *put.shape[2:]))))
    return found
