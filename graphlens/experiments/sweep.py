"""The sweep as a user asks for it: sites, a source and metrics in, a SweepResult out, with progress, saving and resuming."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT
from graphlens.analysis.metric import Metric
from graphlens.analysis.result import SweepResult, saved_files
from graphlens.analysis.sites import Site, Sites, listed
from graphlens.analysis.sources import HarvestMean, Source, as_source
from graphlens.errors import InputError, checked_number, warn
from graphlens.experiments.recompute import MAX_BATCH_TOKENS
from graphlens.experiments.sweep_metrics import Measure
from graphlens.experiments.sweep_run import SweepRun, start_sweep
from graphlens.model.text import is_text
from graphlens.views.progress import note, steps

if TYPE_CHECKING:
    from graphlens.model.config import HookedTransformerConfig
    from graphlens.model.hooked_transformer import HookedTransformer
    from graphlens.model.runner import Runner

Metrics = Measure | Iterable[Measure] | Mapping[str, Measure]
SAVE_EVERY = 5.0  # seconds


def sweep(
    model: HookedTransformer[Any],
    corrupted_tokens: Any,
    sites: Iterable[Site] | Site | Sites,
    source: Any,
    metric: Metrics,
    *,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    recompute: bool = True,
    verbose: bool = True,
    save_to: str | os.PathLike[str] | None = None,
    resume: bool = False,
    **forward_options: Any,
) -> SweepResult:
    """Patches each site in turn into the run of the corrupted prompts, and measures what that does.

    Only layers and positions that a patch can reach are computed again; what cannot be so takes one forward per patch,
    which ``metadata["general_path"]`` explains. The values are the same.

    Args:
        model: The model.
        corrupted_tokens: Tokens [b, p] or text, as ``forward`` takes them; but a list of texts is padded on the left, so
            that the last position is each one's last token.
        sites: A Site, a list of them (an axis "site"), or a ``grid``.
        source: What is put there: a cache of the clean run, "zero", "mean", "noise" or Noise(...).
        metric: One of graphlens.metrics, which lets the sweep compute only the logits it reads, or a function of logits
            [b, p, V] to a number; several, as a list or by name, make a first axis "metric"; reduction="none" makes a
            last axis "batch".
        max_batch_tokens: How many tokens are computed at once.
        recompute: False always takes one forward per patch.
        verbose: Whether a terminal shows a progress bar.
        save_to: A file to save what is done to, every few seconds and at an interruption.
        resume: Whether to go on from what ``save_to`` holds, if it is the same sweep (the values of a cache are not
            compared).
        **forward_options: Those of ``forward``: attention_mask, prepend_bos, padding_side.

    Returns:
        The metric of each patched run, with the axes of the sites, and the clean and corrupted baselines.

    Raises:
        UnknownHookPoint: For a hook point that is not there.
        InputError: For what does not fit the model, the prompts or each other, and for a metric that is NaN or not one
            number.
    """
    places = listed(sites)
    check_processing(model.cfg, source)
    given, runner = as_source(source), model.runner
    recompute, resume = checked_number(recompute, "recompute", bool), checked_number(resume, "resume", bool)

    def start(measures: list[Measure], left: list[int]) -> SweepRun:
        some = [places.sites[i] for i in left]
        return start_sweep(
            runner, corrupted_tokens, some, given, measures, max_batch_tokens, recompute, **forward_options
        )

    def identity(measures: list[Measure], names: list[str] | None) -> str:
        options: list[object] = [names, runner.active().key(), sorted(forward_options.items())]
        if not isinstance(corrupted_tokens, str) and is_text(corrupted_tokens):
            options.append("padded on the left")  # a file from when they were not is another sweep's
        return _identity(runner, corrupted_tokens, places, given, measures, options)

    return collect(runner, places, metric, start, verbose, save_to, resume, identity)


def check_processing(cfg: HookedTransformerConfig, source: object) -> None:
    """Refuses activations of a model whose weights were processed in another way; warns of means of a model of another name.

    Args:
        cfg: The configuration of the model that is patched.
        source: Where patched values come from; only a cache that knows its model, and means of a harvest, are checked.

    Raises:
        InputError: If the two were processed differently, so that their activations mean different things.
    """
    if isinstance(source, HarvestMean):
        what, theirs = "harvest", source.processing
        if source.model_name != cfg.model_name:
            warn(f"the means are of {source.model_name}'s activations, and this model is {cfg.model_name}.")
    else:
        what, theirs = (
            "cache",
            getattr(getattr(getattr(source, "model", None), "cfg", None), "processing", cfg.processing),
        )
    if tuple(theirs) != tuple(cfg.processing):
        raise InputError(
            f"this {what} was made by a model with other weight processing ({_said(theirs)}) than this one "
            f"({_said(cfg.processing)}): its activations mean something else. Make it with this model."
        )


def collect(
    runner: Runner[ArrayT],
    places: Sites,
    metric: Metrics,
    start: Callable[[list[Measure], list[int]], SweepRun],
    verbose: bool,
    save_to: str | os.PathLike[str] | None = None,
    resume: bool = False,
    identity: Callable[[list[Measure], list[str] | None], str] | None = None,
) -> SweepResult:
    """Runs a sweep into a result, with progress, saving and resuming.

    Args:
        runner: Runs the model.
        places: The sites.
        metric: See ``sweep``, as for ``verbose``, ``save_to`` and ``resume``.
        start: Begins the sweep: (metrics, the indices of the sites that are left) -> the sweep under way.
        verbose: See there.
        save_to: See there.
        resume: See there.
        identity: (metrics, their names) -> what tells a saved sweep from any other; None if it cannot be saved.

    Returns:
        The values of all sites, earlier saved ones included.

    Raises:
        InputError: For metrics that do not go together, a folder that is not there, and the saved file of another sweep.
    """
    measures, names = _measures(metric)
    batch = _batch_axis(measures)
    name = None if save_to is None or identity is None else identity(measures, names)
    if save_to is not None and not saved_files(save_to)[0].parent.is_dir():
        raise InputError(f"{saved_files(save_to)[0].parent}: no such folder to save the sweep in. Make it first.")
    done = _earlier(save_to, name, resume)
    left = (
        list(range(len(places.sites))) if done is None else np.flatnonzero(np.isnan(_per_site(done, places))).tolist()
    )
    if not left:
        assert done is not None
        if save_to is not None:
            done.save(save_to)  # tidies up after a process that was killed at the end of its last save
        return done
    run = start(measures, left)
    result = _Result(places, names, batch, run, runner.config.model_name, name, done)
    saved = time.monotonic()
    try:
        with steps("Patching", len(places.sites)) if verbose else nullcontext(_Silent()) as progress:
            progress.advance(len(places.sites) - len(left))
            for indices, values in run:
                result.fill([left[i] for i in indices], values)
                progress.advance(len(indices))
                if save_to is not None and time.monotonic() - saved > SAVE_EVERY:
                    result.made().save(save_to)
                    saved = time.monotonic()
    finally:
        if save_to is not None and result.started:
            result.made().save(save_to)
    if verbose and run.notes and run.quick < len(left):
        note(f"{len(left) - run.quick} of {len(left)} patches took a forward each: {'; '.join(run.notes)}.")
    return result.made()


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


class _Silent:
    """A progress bar that is not shown."""

    def advance(self, count: int = 1) -> None:
        """Does nothing."""


class _Result:
    """A result being filled in."""

    def __init__(
        self,
        sites: Sites,
        names: list[str] | None,
        batch: bool,
        run: SweepRun,
        model_name: str,
        identity: str | None,
        done: SweepResult | None,
    ) -> None:
        self._sites, self._names, self._batch, self._run = sites, names, batch, run
        self._identity, self._model_name = identity, model_name
        size = run.corrupted[0].shape if batch else ()
        self._values = np.full((len(run.metrics), len(sites.sites), *size), np.nan)
        self.started = done is not None
        if done is not None:
            self._values[:] = done.values.reshape(self._values.shape)

    def fill(self, indices: list[int], values: list[Array]) -> None:
        """Puts in the values of some sites: their indices, and an array for each metric."""
        self._values[:, indices] = np.stack(values)
        self.started = True

    def made(self) -> SweepResult:
        """The result so far, NaN where a site is not done."""
        sites, run = self._sites, self._run
        tail = self._values.shape[2:]
        values = self._values.reshape(len(run.metrics), *sites.shape, *tail)
        baselines: dict[str, Any] = {"corrupted": np.stack(run.corrupted)}
        known = [value for value in run.clean if value is not None]
        baselines["clean"] = np.stack(known) if len(known) == len(run.clean) else None
        axes, labels = sites.axes, dict(sites.labels)
        called = [_called(metric) for metric in run.metrics]
        if self._names is None:
            values = values[0]
            baselines = {name: None if value is None else value[0] for name, value in baselines.items()}
        else:
            axes, labels["metric"] = ("metric", *axes), tuple(self._names)
        if self._batch:
            axes, labels["batch"] = (*axes, "batch"), tuple(map(str, range(tail[0])))
        metadata: dict[str, Any] = {"model": self._model_name, "metrics": called}
        if self._identity is not None:
            metadata["sweep"] = self._identity
        if run.notes:
            metadata["general_path"] = "; ".join(run.notes)
        if run.straight_through:
            metadata["straight_through"] = dict(run.straight_through)
        return SweepResult(values, axes, labels, baselines, metadata)


def _measures(metric: Metrics) -> tuple[list[Measure], list[str] | None]:
    """(the metrics, their names where they were given as several)."""
    if isinstance(metric, Metric) or callable(metric):
        return [metric], None
    if isinstance(metric, Mapping):
        names, every = [str(name) for name in metric], list(metric.values())
    else:
        every = list(metric) if isinstance(metric, Iterable) else []
        names = [_called(item) for item in every]
        names = [name if names.count(name) == 1 else f"{name} {i}" for i, name in enumerate(names)]
    if not every or not all(isinstance(item, Metric) or callable(item) for item in every):
        raise InputError("metric is one of graphlens.metrics, a function of logits, or several of these.")
    return every, names


def _called(metric: Measure) -> str:
    return metric.name if isinstance(metric, Metric) else getattr(metric, "__name__", type(metric).__name__)


def _batch_axis(metrics: list[Measure]) -> bool:
    kept = {isinstance(metric, Metric) and metric.reduction == "none" for metric in metrics}
    if len(kept) > 1:
        raise InputError("of several metrics all keep one value per prompt (reduction='none'), or none does.")
    return kept.pop()


def _said(processing: Iterable[str]) -> str:
    return ", ".join(processing) if processing else "none"


def _identity(
    runner: Runner[ArrayT],
    tokens: Any,
    sites: Sites,
    source: Source,
    metrics: list[Measure],
    options: list[object],
) -> str:
    """A digest of the sweep's definition: a saved result is continued only by a sweep that has the same one.

    Of a cache it holds the kind alone, since all its values would have to be read otherwise.
    """
    shown = tokens if isinstance(tokens, str) else np.asarray(tokens).tolist()
    digest = hashlib.sha256()
    keys = [metric.as_key() if isinstance(metric, Metric) else () for metric in metrics]
    named = [(type(metric).__name__, _called(metric), _code(metric)) for metric in metrics]
    source_key = (
        repr(source)
        if dataclasses.is_dataclass(source) and not hasattr(source, "activations")
        else type(source).__name__
    )
    for part in (runner.identity, shown, sites.sites, source_key, named, keys, options):
        _add(digest, part)
    return digest.hexdigest()[:32]


def _code(metric: Measure) -> tuple[bytes, str, str] | None:
    """What a function does, as far as its own code says: two lambdas have the same name."""
    code = getattr(metric, "__code__", None)
    return None if code is None else (code.co_code, repr(code.co_consts), repr(code.co_names))


def _add(digest: _Digest, part: object) -> None:
    """Adds a value to a digest: tuples and lists item by item, bytes as they are, anything else by its repr."""
    if hasattr(part, "__array__"):
        part = np.asarray(part).tolist()  # whole: its repr would leave out the middle
    if isinstance(part, (tuple, list)):
        digest.update(b"(")
        for item in part:
            _add(digest, item)
        digest.update(b")")
    else:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
        digest.update(b"\0")


def _earlier(save_to: str | os.PathLike[str] | None, identity: str | None, resume: bool) -> SweepResult | None:
    """The saved part of the same sweep; None without one. Raises InputError for that of another."""
    if not resume:
        return None
    if save_to is None:
        raise InputError("resume=True needs save_to=: the file to go on from.")
    if not saved_files(save_to)[0].exists():
        return None
    found = SweepResult.load(save_to)
    if found.metadata.get("sweep") != identity:
        raise InputError(
            f"{save_to} holds another sweep: other prompts, sites, metrics or another model. Save this one elsewhere, or "
            "leave out resume."
        )
    return found


def _per_site(result: SweepResult, sites: Sites) -> Array:
    """One value for each site, NaN where it is not done."""
    values = result.values if "metric" not in result.axes else result.values[0]
    values = values.reshape(len(sites.sites), -1)
    found: Array = values[:, 0]
    return found
