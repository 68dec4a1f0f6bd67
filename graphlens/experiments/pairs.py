"""Patches over a data set of clean and corrupted prompts, run or estimated batch after batch: each pair has its own value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT
from graphlens.analysis.metric import Metric
from graphlens.analysis.normalised_metric import Normalised
from graphlens.analysis.result import SweepResult
from graphlens.analysis.sites import Site, Sites, listed
from graphlens.analysis.sources import Cache, HarvestMean, Mean, SourceInput, as_source
from graphlens.analysis.summary import EffectSummary, summarise
from graphlens.errors import InputError, checked_number
from graphlens.experiments.attribution import attribution_patch, checked_steps
from graphlens.experiments.on_ray import Workers, workers_of
from graphlens.experiments.prompt_batches import Prompts, alike, prompts_of
from graphlens.experiments.recompute import MAX_BATCH_TOKENS
from graphlens.experiments.sweep import sweep
from graphlens.views.progress import steps as steps_shown

if TYPE_CHECKING:
    from graphlens.model.hooked_transformer import HookedTransformer

MetricT = TypeVar("MetricT", bound=Metric)
LOGITS = "unembed.hook_out"
_Metrics: TypeAlias = Metric | list[Metric] | dict[str, Metric]
# A batch of pairs: which they are, their clean and corrupted tokens [b, p], and how they are measured.
_Item: TypeAlias = tuple[list[int], Array, Array, Sites, _Metrics, SourceInput, int]


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
    spread, kept = workers_of(engine, workers, threads, allow_mixed), checked_number(per_example, "per_example", bool)
    work: _Work[ArrayT] = _Work(_sweep_of, source, max_batch_tokens, batch_size, prepend_bos, "Patching")
    found = work.over(model, clean, corrupted, sites, metric, spread, verbose)
    return summarise(found, confidence, resamples, seed, kept)


def attribution_pairs(
    model: HookedTransformer[ArrayT],
    clean: Prompts,
    corrupted: Prompts,
    sites: Iterable[Site] | Site | Sites,
    metric: Metric | Iterable[Metric] | Mapping[str, Metric],
    *,
    source: SourceInput = "clean",
    steps: int = 0,
    batch_size: int = 16,
    engine: str = "local",
    workers: int | None = None,
    threads: int = 1,
    allow_mixed: bool = False,
    per_example: bool = False,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    prepend_bos: bool | None = None,
    verbose: bool = True,
) -> EffectSummary:
    """Estimates what ``sweep_pairs`` would find, from a forward and a backward of each batch (attribution patching).

    How good such an estimate is, and where it is poor: see ``attribution_patch``.

    Args:
        model: The model.
        clean: See ``sweep_pairs``, as for all that is not named here.
        corrupted: See there.
        sites: See there.
        metric: See there; it needs a derivative.
        source: See there.
        steps: How many gradients are averaged on the way to the patched activation; 0 takes the one at the corrupted run.
        batch_size: See there.
        engine: See there.
        workers: See there.
        threads: See there.
        allow_mixed: See there.
        per_example: See there.
        confidence: See there.
        resamples: See there.
        seed: See there.
        prepend_bos: See there.
        verbose: See there.

    Returns:
        The mean estimated effect at each site with its standard error, bootstrap interval and p-value.

    Raises:
        UnknownHookPoint: For a hook point that is not there.
        InputError: For pairs of different lengths, other numbers of prompts, and what ``attribution_patch`` refuses.
    """
    spread, kept = workers_of(engine, workers, threads, allow_mixed), checked_number(per_example, "per_example", bool)
    work: _Work[ArrayT] = _Work(_estimate_of, source, checked_steps(steps), batch_size, prepend_bos, "Estimating")
    found = work.over(model, clean, corrupted, sites, metric, spread, verbose)
    return summarise(found, confidence, resamples, seed, kept)


@dataclass(frozen=True)
class _Work(Generic[ArrayT]):
    """What is done with every batch of pairs.

    Attributes:
        job: (model, batch) -> which pairs it is of, and its result.
        source: Where patched values come from.
        number: What the job takes besides: the tokens of a run, or the gradients to average.
        batch_size: How many pairs are run at once, at most.
        prepend_bos: Whether texts get a BOS token.
        doing: What a progress bar says.
    """

    job: Callable[[HookedTransformer[ArrayT], _Item], tuple[list[int], SweepResult]]
    source: SourceInput
    number: int
    batch_size: int
    prepend_bos: bool | None
    doing: str

    def over(
        self,
        model: HookedTransformer[ArrayT],
        clean: Prompts,
        corrupted: Prompts,
        sites: Iterable[Site] | Site | Sites,
        metric: object,
        spread: Workers | None,
        verbose: bool,
    ) -> SweepResult:
        """The results of all pairs side by side, along a last axis "batch"."""
        items = self._items(model, clean, corrupted, listed(sites), metric)
        if spread is None:
            parts = (self.job(model, item) for item in items)
        else:
            parts = (part for _, part in spread.spread(model, self.job, items))
        found: dict[int, SweepResult] = {}
        count = sum(len(rows) for rows, *_ in items)
        with steps_shown(self.doing, count) if verbose else nullcontext() as progress:
            for rows, part in parts:
                for column, row in enumerate(rows):
                    found[row] = part.sel(batch=column)
                if progress is not None:
                    progress.advance(len(rows))
        return _joined([found[row] for row in range(count)])

    def _items(
        self, model: HookedTransformer[ArrayT], clean: Prompts, corrupted: Prompts, places: Sites, metric: object
    ) -> list[_Item]:
        """The batches, once everything is checked."""
        batch_size = checked_number(self.batch_size, "batch_size", least=1)
        given = [prompts_of(model, prompts, self.prepend_bos) for prompts in (clean, corrupted)]
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
        batches = list(alike([len(one) for one, _ in pairs], batch_size))
        source = None if isinstance(self.source, str) and self.source == "clean" else as_source(self.source)
        if isinstance(source, Cache):
            raise InputError(
                "a cache holds the rows of one run, and pairs are run in batches of their own: give the prompts that it is of "
                "as clean, and leave source out."
            )
        if isinstance(source, Mean) and len(batches) > 1:
            raise InputError(
                f"source='mean' is the mean of the prompts that are run together, and these are run in {len(batches)} batches, "
                "each with another mean. Raise batch_size, for pairs of one length, or pass a source with the mean of your "
                "data."
            )
        if isinstance(source, HarvestMean):  # goes to the workers with the batches: none has to read the harvest
            for site in places.sites:
                source.read(site.hook)
        items: list[_Item] = []
        for rows in batches:
            here, there = (np.stack([pairs[row][side] for row in rows]) for side in (0, 1))
            items.append((rows, here, there, places, measured(rows), self.source, self.number))
        return items


def _sweep_of(model: HookedTransformer[ArrayT], item: _Item) -> tuple[list[int], SweepResult]:
    """The sweep of one batch of pairs, and which pairs they are."""
    rows, _, corrupted, places, metric, _, most = item
    return rows, sweep(model, corrupted, places, _values(model, item), metric, max_batch_tokens=most, verbose=False)


def _estimate_of(model: HookedTransformer[ArrayT], item: _Item) -> tuple[list[int], SweepResult]:
    """The estimates of one batch of pairs, and which pairs they are."""
    rows, _, corrupted, places, metric, _, count = item
    found = attribution_patch(model, corrupted, places, _values(model, item), metric, steps=count, verbose=False)
    return rows, found


def _values(model: HookedTransformer[ArrayT], item: _Item) -> object:
    """Where the patched values of a batch come from: its clean run, unless another source was named."""
    _, clean, _, places, _, source, _ = item
    if not (isinstance(source, str) and source == "clean"):
        return source
    hooks = list(dict.fromkeys(site.hook for site in places.sites))
    return model.run_with_cache(clean, names_filter=[*hooks, LOGITS])[1]


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
