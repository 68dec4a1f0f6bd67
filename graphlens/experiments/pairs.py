"""A sweep over a data set of clean and corrupted prompts: batch after batch, each pair with a value of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

import numpy as np

from graphlens.analysis.arrays import Array, ArrayInput, ArrayT, as_array
from graphlens.analysis.metric import Metric
from graphlens.analysis.normalised_metric import Normalised
from graphlens.analysis.result import SweepResult
from graphlens.analysis.sites import Site, Sites, listed
from graphlens.analysis.sources import Cache, Mean, SourceInput, as_source
from graphlens.analysis.summary import EffectSummary, summarise
from graphlens.errors import InputError, checked_number, is_one_of
from graphlens.experiments.on_ray import Workers
from graphlens.experiments.recompute import MAX_BATCH_TOKENS
from graphlens.experiments.sweep import sweep
from graphlens.model.text import is_text
from graphlens.views.progress import steps

if TYPE_CHECKING:
    from graphlens.model.hooked_transformer import HookedTransformer

MetricT = TypeVar("MetricT", bound=Metric)
LOGITS = "unembed.hook_out"
_Metrics: TypeAlias = Metric | list[Metric] | dict[str, Metric]
# A batch of pairs: which they are, their clean and corrupted tokens [b, p], and how they are measured.
_Item: TypeAlias = tuple[list[int], Array, Array, Sites, _Metrics, SourceInput, int]
# Texts, or the token ids of each prompt, as a list of them or an array [n, p].
Prompts: TypeAlias = str | Sequence[str] | Sequence[Sequence[int]] | Sequence[ArrayInput] | ArrayInput


def sweep_pairs(
    model: HookedTransformer[ArrayT],
    clean: Prompts,
    corrupted: Prompts,
    sites: Iterable[Site] | Site | Sites,
    metric: Metric | Iterable[Metric] | Mapping[str, Metric],
    *,
    source: SourceInput = "clean",
    batch_size: int = 16,
    engine: str = "local",
    workers: int | None = None,
    threads: int = 1,
    allow_mixed: bool = False,
    per_example: bool = False,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    prepend_bos: bool | None = None,
    verbose: bool = True,
) -> EffectSummary:
    """Patches each site in turn, on every pair of a data set, and says how large its effect is and how sure.

    Pairs of one length are run together, so that nothing is padded and positions mean the same in all of them.

    Args:
        model: The model.
        clean: The prompts that patched values come from: a list of texts, or of token ids, or tokens [n, p].
        corrupted: The prompts that are patched: as many, each of as many tokens as its clean one.
        sites: See ``sweep``. Positions count from the start, negative ones from the end, in prompts of any length.
        metric: One of graphlens.metrics, or several as a list or by name. What it holds for each prompt (the tokens of a
            LogitDiff, say) has n entries. Each prompt has a value of its own, whatever its ``reduction``.
        source: "clean", or any other source of ``sweep``: "zero", "mean", "noise". "mean" is that of the prompts that are run
            together, and so takes pairs of one length, no more than ``batch_size``; what "noise" draws depends on it too.
        batch_size: How many pairs are run at once, at most.
        engine: "local", or "ray": in the workers of a Ray cluster (extra ``ray``). The values are the same for any number of
            workers.
        workers: How many of Ray's workers; None for as many as its cores allow.
        threads: How many threads each of them computes with.
        allow_mixed: True lets machines take part that differ in processor, ONNX Runtime or packages.
        per_example: True keeps each pair's values: ``summary.examples``.
        confidence: Of the bootstrap interval, between 0 and 1.
        resamples: How many means are drawn for it, and how many patterns of signs for the p-values.
        seed: Of these draws.
        max_batch_tokens: See ``sweep``.
        prepend_bos: Whether texts get a BOS token; None for the model's default.
        verbose: Whether a terminal shows a progress bar.

    Returns:
        The mean effect at each site with its standard error, bootstrap interval and p-value, each a SweepResult.

    Raises:
        UnknownHookPoint: For a hook point that is not there.
        InputError: For pairs of different lengths, other numbers of prompts, and what ``sweep`` refuses.
    """
    places, batch_size = listed(sites), checked_number(batch_size, "batch_size", least=1)
    per_example = checked_number(per_example, "per_example", bool)
    if not is_one_of(engine, ("local", "ray")):
        raise InputError(f"engine={engine!r}: there are 'local' and 'ray'.")
    spread = Workers(workers, threads, allow_mixed) if engine == "ray" else None
    given = [_prompts(model, prompts, prepend_bos) for prompts in (clean, corrupted)]
    if len(given[0]) != len(given[1]):
        raise InputError(
            f"there are {len(given[0])} clean prompts and {len(given[1])} corrupted ones: they go in pairs."
        )
    pairs = list(zip(*given, strict=True))
    for index, (one, other) in enumerate(pairs):
        if len(one) != len(other):
            raise InputError(
                f"pair {index} has {len(one)} clean tokens and {len(other)} corrupted ones: an activation goes to the same "
                "position of the other prompt, so that both need as many."
            )
    measured = _Measured(model, metric, len(pairs))
    batches = list(_batches([len(one) for one, _ in pairs], batch_size))
    given_source = None if isinstance(source, str) and source == "clean" else as_source(source)
    if isinstance(given_source, Cache):
        raise InputError(
            "a cache holds the rows of one run, and pairs are run in batches of their own: give the prompts that it is of as "
            "clean, and leave source out."
        )
    if isinstance(given_source, Mean) and len(batches) > 1:
        raise InputError(
            f"source='mean' is the mean of the prompts that are run together, and these are run in {len(batches)} batches, "
            "each with another mean. Raise batch_size, for pairs of one length, or pass a source with the mean of your data."
        )
    items: list[_Item] = []
    for rows in batches:
        here, there = (np.stack([pairs[row][side] for row in rows]) for side in (0, 1))
        items.append((rows, here, there, places, measured(rows), source, max_batch_tokens))
    parts = _done(model, items) if spread is None else (part for _, part in spread.spread(model, _sweep_of, items))
    found: dict[int, SweepResult] = {}
    with steps("Patching", len(pairs)) if verbose else nullcontext() as progress:
        for rows, part in parts:
            for column, row in enumerate(rows):
                found[row] = part.sel(batch=column)
            if progress is not None:
                progress.advance(len(rows))
    return summarise(_joined([found[row] for row in range(len(pairs))]), confidence, resamples, seed, per_example)


def _done(model: HookedTransformer[ArrayT], items: Iterable[_Item]) -> Iterator[tuple[list[int], SweepResult]]:
    """The sweeps of some batches, one after the other."""
    for item in items:
        yield _sweep_of(model, item)


def _sweep_of(model: HookedTransformer[ArrayT], item: _Item) -> tuple[list[int], SweepResult]:
    """The sweep of one batch of pairs, and which pairs they are."""
    rows, clean, corrupted, places, metric, source, max_batch_tokens = item
    values = source
    if isinstance(source, str) and source == "clean":
        hooks = list(dict.fromkeys(site.hook for site in places.sites))
        _, values = model.run_with_cache(clean, names_filter=[*hooks, LOGITS])
    return rows, sweep(model, corrupted, places, values, metric, max_batch_tokens=max_batch_tokens, verbose=False)


class _Measured:
    """The metrics of a data set, of which any prompts' own can be had.

    Args:
        model: The model, whose tokenizer makes token ids of text.
        metric: See ``sweep_pairs``.
        prompts: How many prompts there are.
    """

    def __init__(self, model: HookedTransformer[ArrayT], metric: object, prompts: int) -> None:
        self._named = isinstance(metric, Mapping)
        self._alone = isinstance(metric, Metric) or not isinstance(metric, Iterable)
        given: list[tuple[object, object]]
        if isinstance(metric, Mapping):
            given = list(metric.items())
        elif isinstance(metric, Iterable) and not isinstance(metric, Metric):
            given = [(None, one) for one in metric]
        else:
            given = [(None, metric)]
        bound = []
        for name, one in given:
            if not isinstance(one, Metric):
                raise InputError(
                    f"metric is one of graphlens.metrics, or several: {type(one).__name__} does not say what each prompt's is."
                )
            one = model.runner.bound(one, None)
            one = _each_prompt_its_own(one)
            _ensure_of(one, prompts)
            bound.append((name, one))
        if not bound:
            raise InputError("metric is an empty list.")
        self._metrics = bound

    def __call__(self, rows: Sequence[int]) -> _Metrics:
        """The metrics of some prompts, as ``sweep`` takes them."""
        found = [(name, _of_rows(metric, rows)) for name, metric in self._metrics]
        if self._named:
            return {str(name): metric for name, metric in found}
        return found[0][1] if self._alone else [metric for _, metric in found]


def _each_prompt_its_own(metric: Metric) -> Metric:
    """The metric with reduction "none"."""
    if isinstance(metric, Normalised):
        return dataclasses.replace(metric, metric=_each_prompt_its_own(metric.metric))
    changes: dict[str, object] = {"reduction": "none"}
    return dataclasses.replace(metric, **changes)


def _arrays(metric: Metric) -> dict[str, Array]:
    """The fields that hold something for each prompt."""
    values = {field.name: getattr(metric, field.name) for field in dataclasses.fields(metric)}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray) and value.ndim}


def _ensure_of(metric: Metric, prompts: int) -> None:
    """Raises InputError for a metric of another number of prompts."""
    plain = metric.metric if isinstance(metric, Normalised) else metric
    for name, value in [*_arrays(plain).items(), *(_arrays(metric).items() if plain is not metric else ())]:
        if len(value) != prompts:
            raise InputError(f"{type(metric).__name__}.{name} is of {len(value)} prompts; there are {prompts} pairs.")


def _of_rows(metric: MetricT, rows: Sequence[int]) -> MetricT:
    """The metric of some prompts."""
    if isinstance(metric, Normalised):
        metric = dataclasses.replace(metric, metric=_of_rows(metric.metric, rows))
    taken = {name: value[list(rows)] for name, value in _arrays(metric).items()}
    return dataclasses.replace(metric, **taken) if taken else metric


def _prompts(model: HookedTransformer[ArrayT], prompts: Prompts, prepend_bos: bool | None) -> list[Array]:
    """Each prompt's token ids."""
    if isinstance(prompts, str):
        prompts = [prompts]
    if is_text(prompts):
        return [as_array(model.to_tokens(text, prepend_bos, truncate=False))[0] for text in prompts]
    rows = list(cast("Iterable[ArrayInput]", prompts))
    if not rows:
        raise InputError("the list of prompts is empty.")
    found = [as_array(row) for row in rows]
    for index, row in enumerate(found):
        if row.ndim != 1 or row.dtype.kind not in "iu" or not row.size:
            raise InputError(
                f"prompt {index} is {row.dtype}{list(row.shape)}: a prompt is text or a list of token ids, and all are of one "
                "kind."
            )
    return found


def _batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Pairs of one length together, at most so many at once."""
    alike: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        alike.setdefault(length, []).append(row)
    for rows in alike.values():
        yield from (rows[start : start + most] for start in range(0, len(rows), most))


def _joined(parts: Sequence[SweepResult]) -> SweepResult:
    """The results of single prompts side by side, along a last axis "batch"."""
    first = parts[0]
    baselines = {
        name: None
        if first.baselines[name] is None
        else np.stack([np.asarray(part.baselines[name]) for part in parts], -1)
        for name in first.baselines
    }
    metadata = {name: value for name, value in first.metadata.items() if name != "selected"}
    labels = {**first.labels, "batch": tuple(str(row) for row in range(len(parts)))}
    values = np.stack([part.values for part in parts], -1)
    return SweepResult(values, (*first.axes, "batch"), labels, baselines, metadata)
