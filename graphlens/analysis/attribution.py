"""Estimates of patches from gradients, how far they can be trusted, and what components write to the logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import as_array
from graphlens.analysis.metrics import LogitDiff
from graphlens.analysis.sites import Site, Sites, listed
from graphlens.analysis.sources import as_source
from graphlens.analysis.sweep_result import SweepResult
from graphlens.analysis.sweeps import Measure, check_processing, collect
from graphlens.errors import InputError

Array = npt.NDArray[Any]


def attribution_patch(
    model: Any,
    corrupted_tokens: Any,
    sites: Iterable[Site] | Site | Sites,
    source: Any,
    metric: Measure | Iterable[Measure] | Mapping[str, Measure],
    *,
    steps: int = 0,
    verbose: bool = True,
    **forward_options: Any,
) -> SweepResult:
    """Estimates what ``sweep`` would find, from one forward and backward: the corrupted baseline plus
    (source - corrupted) . gradient, summed over each site (attribution patching: Nanda 2023, Syed et al. 2023).

    The arguments are those of ``sweep``; a metric needs a derivative (see ``model.gradients``) and the mean over the batch.
    ``steps``: the mean of that many gradients on the straight way to the patched activation of the whole hook point, at
    midpoints (integrated gradients: Sundararajan et al. 2017), a forward and backward each for every hook point.

    This is an approximation. It is poor where the model bends: at saturated attention (whose gradient vanishes, so that
    q and k seem not to matter), at large patches such as the residual stream's first layers, and at MLP 0, which acts as
    a second embedding. ``compare_with_sweep`` measures it.
    """
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 0:
        raise InputError(f"steps={steps!r}: it is 0, or how many gradients to average.")
    places = listed(sites)
    check_processing(model, source)
    given = as_source(source)

    def start(measures: list[Measure], left: list[int]) -> Any:
        return model._attributions(
            corrupted_tokens, [places.sites[i] for i in left], given, measures, steps, **forward_options
        )

    return collect(model, places, metric, start, verbose)


@dataclass(frozen=True)
class Comparison:
    """How an estimate stands to the exact sweep. Effects are values less the corrupted baseline.

    ``correlation``: Pearson's, of the effects (NaN where either is constant). ``slope``: of the least-squares line through
    0, estimate over exact. ``worst``: (labels, estimated effect, exact effect) of the sites furthest apart.
    """

    correlation: float
    slope: float
    largest_error: float
    worst: tuple[tuple[Mapping[str, str], float, float], ...]

    def __str__(self) -> str:
        lines = [f"correlation {self.correlation:.3f}, slope {self.slope:.3f}, largest error {self.largest_error:.3g}"]
        for labels, estimated, exact in self.worst:
            where = ", ".join(f"{axis} {label}" for axis, label in labels.items())
            lines.append(f"  {where}: estimated {estimated:+.3g}, exact {exact:+.3g}")
        return "\n".join(lines)


def compare_with_sweep(estimate: SweepResult, exact: SweepResult, n: int = 10) -> Comparison:
    """How far attribution patching is from the patches themselves, over the same sites and metric.

    Raises InputError for results of other axes or labels.
    """
    if estimate.axes != exact.axes or estimate.labels != exact.labels:
        raise InputError("the estimate and the sweep are not over the same sites: their axes or labels differ.")
    found, true = (result.values - result.against("corrupted") for result in (estimate, exact))
    a, b = found.ravel(), true.ravel()
    if np.isnan(a).any() or np.isnan(b).any():
        raise InputError("a result holds values that are not computed yet: finish the sweep first.")
    constant = a.std() == 0 or b.std() == 0
    correlation = float("nan") if constant else float(np.corrcoef(a, b)[0, 1])
    norm = float(b @ b)
    errors = np.abs(a - b)
    worst = []
    for flat in np.argsort(-errors, kind="stable")[:n]:
        index = np.unravel_index(int(flat), found.shape)
        labels = {axis: exact.labels[axis][int(i)] for axis, i in zip(exact.axes, index, strict=True)}
        worst.append((labels, float(a[flat]), float(b[flat])))
    return Comparison(correlation, float(a @ b) / norm if norm else float("nan"), float(errors.max()), tuple(worst))


def edge_attribution(
    model: Any,
    corrupted_tokens: Any,
    clean_cache: Mapping[str, Any],
    metric: Any,
    *,
    steps: int = 0,
    **forward_options: Any,
) -> SweepResult:
    """Scores every edge of the residual graph: what its sender writes in the clean run less what in the corrupted one,
    times the gradient with respect to what its receiver reads, before LayerNorm (edge attribution patching: Syed et al.
    2023). An axis "edge", labelled "L0H1->L2H3.q", "embed->L0MLP", "L1MLP->logits".

    Senders are the embeddings together, heads and MLPs; receivers q, k and v of each head, MLPs and the logits. A score
    estimates what patching that edge alone adds to the metric; a sender's scores sum to its attribution patching score.
    ``steps``: gradients averaged between the corrupted embeddings and the clean ones (EAP-IG: Hanna et al. 2024).
    ``clean_cache`` needs blocks.0.hook_resid_pre, hook_z and hook_mlp_out. Raises UnknownHookPoint and InputError.
    """
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 0:
        raise InputError(f"steps={steps!r}: it is 0, or how many gradients to average.")
    check_processing(model, clean_cache)
    if isinstance(metric, (list, tuple, dict)):
        raise InputError("edges are scored by one metric, not by several.")
    run = model._edge_run(corrupted_tokens, clean_cache, metric, **forward_options)
    bound = run.sweeper._metrics[0]
    values = model._edge_scores(run, bound, steps)
    labels = {"edge": [str(edge) for edge in run.edges]}
    metadata = {"model": model.cfg.model_name, "metrics": [bound.name if hasattr(bound, "name") else "metric"]}
    return SweepResult(values, ("edge",), labels, {"corrupted": 0.0}, metadata)


def circuit(scores: SweepResult, n: int) -> list[str]:
    """The ``n`` edges of the largest scores, by absolute value. Raises InputError unless 0 <= n <= their number."""
    if scores.axes != ("edge",):
        raise InputError(f"a circuit is taken from edge_attribution's result, not from one over {scores.axes}.")
    if not 0 <= n <= scores.shape[0]:
        raise InputError(f"n={n}: there are {scores.shape[0]} edges.")
    order = np.argsort(-np.abs(scores.values), kind="stable")[:n]
    return [scores.labels["edge"][int(i)] for i in order]


def faithfulness(
    model: Any,
    corrupted_tokens: Any,
    clean_cache: Mapping[str, Any],
    metric: Any,
    circuits: Mapping[Any, Iterable[str]],
    **forward_options: Any,
) -> SweepResult:
    """The metric with every edge outside a circuit patched to the corrupted run, for several circuits: an axis "circuit".

    ``circuits``: names (say, numbers of edges) -> edges by label. In each run the edges of the circuit carry what their
    senders write in that run, beginning with the clean embeddings; all others carry what the corrupted run wrote. All
    edges give the clean run, none the corrupted one; ``metric.normalised()`` makes of it the usual faithfulness.
    """
    check_processing(model, clean_cache)
    run = model._edge_run(corrupted_tokens, clean_cache, metric, **forward_options)
    known = {str(edge): edge for edge in run.edges}
    if not isinstance(circuits, Mapping) or not circuits:
        raise InputError("circuits maps names to edges: {'mine': ['embed->logits']}, say; there is none to measure.")
    if getattr(metric, "reduction", "mean") != "mean":
        raise InputError(f"{metric!r} is a number for each prompt; faithfulness is of one: reduction='mean'.")
    values = []
    for name, edges in circuits.items():
        if isinstance(edges, str):
            raise InputError(f"circuit {name!r} is the text {edges!r}: give a list of edges.")
        labels = list(dict.fromkeys(edges))
        unknown = [label for label in labels if label not in known]
        if unknown:
            raise InputError(
                f"circuit {name!r}: {unknown[0]!r} is no edge of this model. They look like 'L0H1->L2H3.q', "
                "'embed->L0MLP', 'L1MLP->logits'."
            )
        logits = model._circuit_logits(run, [known[label] for label in labels])
        values.append(run.sweeper._measuring.of(run.sweeper._metrics[0], logits))
    baselines = {"corrupted": run.sweeper.corrupted[0], "clean": run.sweeper.clean[0]}
    names = {"circuit": [str(name) for name in circuits]}
    return SweepResult(np.stack(values), ("circuit",), names, baselines, {"model": model.cfg.model_name})


def direct_logit_attribution(model: Any, input: Any, metric: LogitDiff, **forward_options: Any) -> SweepResult:
    """What each component writes to a logit difference directly: heads, MLPs, embeddings and biases, [component].

    Each output, centred and divided by the final norm's scale of this run, times the norm's weight and the difference of
    the two tokens' columns of W_U, averaged over the prompts. The values sum to the metric (to which "bias", all biases
    together, belongs). Direct effects alone: what later components make of an output is not in it.
    ``input`` and ``forward_options`` are forward's. Elhage et al. 2021; TransformerLens: ``logit_attrs``.
    Raises InputError for another metric.
    """
    if not isinstance(metric, LogitDiff) or metric.reduction != "mean":
        raise InputError(f"direct logit attribution is of a LogitDiff with a mean, not of {type(metric).__name__}.")
    logits, cache = model.run_with_cache(input, **forward_options)
    plain = as_array(logits)
    metric = metric.bound(model.to_single_token if model.tokenizer is not None else None)
    metric.check(plain.shape[-1])
    needs = metric.needs(*plain.shape[:2])
    assert needs.tokens is not None
    assert needs.positions is not None
    batch = plain.shape[0]
    positions = np.broadcast_to(needs.positions, (batch, 1))[:, 0]
    stack, labels = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
    components = np.asarray(stack)[:, np.arange(batch), positions].astype(np.float64)  # [n, b, D]
    scale = np.asarray(cache["ln_final.hook_scale"])[np.arange(batch), positions].astype(np.float64)
    w_u = np.asarray(model.W_U).T[needs.tokens].astype(np.float64)  # [b, 2, D]
    direction = w_u[:, 0] - w_u[:, 1]
    weight, bias = model.weights.get("ln_final.w"), model.weights.get("ln_final.b")
    scaled = direction if weight is None else direction * np.asarray(weight, np.float64)
    if model.cfg.normalization_type.startswith("LN"):
        components = components - components.mean(-1, keepdims=True)
    values = (components / scale * scaled).sum(-1).mean(-1)
    b_u = np.asarray(model.b_U, np.float64)[needs.tokens]
    constant = b_u[:, 0] - b_u[:, 1] + (0 if bias is None else (direction * np.asarray(bias, np.float64)).sum(-1))
    names = list(labels)
    values[names.index("bias")] += constant.mean()
    total = float(metric(plain))
    if abs(values.sum() - total) > 1e-2 * max(float(np.abs(values).max()), abs(total)):
        raise InputError(
            f"the components sum to {values.sum():.4g} and the metric is {total:.4g}: interventions, hooks or edits in the file "
            "change the residual stream or the logits on the way. Attribute the run without them."
        )
    metadata = {"model": model.cfg.model_name, "metrics": [metric.name], "total": total}
    return SweepResult(values, ("component",), {"component": names}, {"corrupted": 0.0}, metadata)
