"""The sweep as a user asks for it: sites, a source and metrics in, a SweepResult out, with progress and a way back in."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from graphlens.analysis.metrics import Metric
from graphlens.analysis.result import SweepResult, saved_files
from graphlens.analysis.sites import Site, Sites, listed
from graphlens.analysis.sources import as_source
from graphlens.errors import InputError
from graphlens.views.progress import note, steps

Array = npt.NDArray[Any]
Measure = Metric | Callable[[Any], Any]
MAX_BATCH_TOKENS = 1024
_SAVE_EVERY = 5.0  # seconds


class Run(Protocol):
    """A sweep under way (graphlens.experiments.sweep_run.SweepRun)."""

    metrics: list[Measure]
    corrupted: list[Array]
    clean: list[Array | None]
    notes: list[str]
    quick: int

    def __iter__(self) -> Iterator[tuple[list[int], list[Array]]]: ...


def sweep(
    model: Any,
    corrupted_tokens: Any,
    sites: Iterable[Site] | Site | Sites,
    source: Any,
    metric: Measure | Iterable[Measure] | Mapping[str, Measure],
    *,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    recompute: bool = True,
    verbose: bool = True,
    save_to: str | os.PathLike[str] | None = None,
    resume: bool = False,
    **forward_options: Any,
) -> SweepResult:
    """Patches each site in turn into the run of ``corrupted_tokens`` and measures what that does.

    ``corrupted_tokens``: tokens [b, p] or text, as forward takes them, and ``forward_options`` forward's own
    (attention_mask, prepend_bos, padding_side). ``sites``: a Site, a list of them (an axis "site"), or a ``grid``.
    ``source``: what is put there: a cache of the clean run, "zero", "mean", "noise" or Noise(...). ``metric``: one of
    graphlens.metrics, which lets the sweep compute only the logits it reads, or a function of logits [b, p, V] to a
    number; several, as a list or by name, make a first axis "metric"; reduction="none" makes a last axis "batch".

    Only layers and positions that a patch can reach are computed again, ``max_batch_tokens`` tokens at a time; what cannot
    be so takes one forward per patch, which ``metadata["general_path"]`` explains; ``recompute=False`` takes it always. The
    values are the same. ``save_to`` keeps what is done there every few seconds and at an interruption, and with
    ``resume=True`` a sweep goes on from it, if it is the same one (the values of a cache are not compared). Raises
    UnknownHookPoint, and InputError for what does not fit the model, the prompts or each other, and for a metric that is
    NaN or not one number.
    """
    places = listed(sites)
    check_processing(model, source)
    given = as_source(source)
    options = {"max_batch_tokens": max_batch_tokens, "recompute": recompute, **forward_options}

    def start(measures: list[Measure], left: list[int]) -> Run:
        found: Run = model._sweep(corrupted_tokens, [places.sites[i] for i in left], given, measures, **options)
        return found

    def identity(measures: list[Measure], names: list[str] | None) -> str:
        edits = model._standing_edits()
        return _identity(
            model, corrupted_tokens, places, given, measures, [names, edits, sorted(forward_options.items())]
        )

    return collect(model, places, metric, start, verbose, save_to, resume, identity)


def check_processing(model: Any, source: Any) -> None:
    """Raises InputError for a cache of a model whose weights were processed otherwise."""
    others = getattr(getattr(source, "model", None), "cfg", None)
    mine = getattr(model.cfg, "processing", None)
    if others is not None and getattr(others, "processing", mine) != mine:
        raise InputError(
            f"this cache was made by a model with other weight processing ({_said(others.processing)}) than this one "
            f"({_said(mine)}): its activations mean something else. Make it with this model."
        )


def collect(
    model: Any,
    places: Sites,
    metric: Any,
    start: Callable[[list[Measure], list[int]], Run],
    verbose: bool,
    save_to: str | os.PathLike[str] | None = None,
    resume: bool = False,
    identity: Callable[[list[Measure], list[str] | None], str] | None = None,
) -> SweepResult:
    """Runs what ``start(metrics, indices of the sites left)`` begins, into a result; with progress, saving and resuming."""
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
        return done
    run = start(measures, left)
    result = _Result(places, names, batch, run, model, name, done)
    saved = time.monotonic()
    try:
        with steps("Patching", len(places.sites)) if verbose else _Silent() as progress:
            progress.advance(len(places.sites) - len(left))
            for indices, values in run:
                result.fill([left[i] for i in indices], values)
                progress.advance(len(indices))
                if save_to is not None and time.monotonic() - saved > _SAVE_EVERY:
                    result.made().save(save_to)
                    saved = time.monotonic()
    finally:
        if save_to is not None and result.started:
            result.made().save(save_to)
    if verbose and run.notes and run.quick < len(left):
        note(f"{len(left) - run.quick} of {len(left)} patches took a forward each: {'; '.join(run.notes)}.")
    return result.made()


class _Silent:
    """A progress bar that nobody sees."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def advance(self, count: int = 1) -> None:
        """Nothing."""


class _Result:
    """A result being filled in."""

    def __init__(
        self,
        sites: Sites,
        names: list[str] | None,
        batch: bool,
        run: Run,
        model: Any,
        identity: str | None,
        done: SweepResult | None,
    ) -> None:
        self._sites, self._names, self._batch, self._run = sites, names, batch, run
        self._identity, self._model_name = identity, str(model.cfg.model_name)
        size = run.corrupted[0].shape if batch else ()
        self._values = np.full((len(run.metrics), len(sites.sites), *size), np.nan)
        self.started = done is not None
        if done is not None:
            self._values[:] = done.values.reshape(self._values.shape)

    def fill(self, indices: list[int], values: list[Array]) -> None:
        """Values of sites, by metric."""
        self._values[:, indices] = np.stack(values)
        self.started = True

    def made(self) -> SweepResult:
        """The result as it stands."""
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
        return SweepResult(values, axes, labels, baselines, metadata)


def _measures(metric: Any) -> tuple[list[Measure], list[str] | None]:
    """(the metrics, their names where they were given as several)."""
    if isinstance(metric, Metric) or callable(metric):
        return [metric], None
    if isinstance(metric, Mapping):
        names, every = [str(name) for name in metric], list(metric.values())
    else:
        every = list(metric)
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


def _said(processing: Any) -> str:
    return ", ".join(processing) if processing else "none"


def _identity(model: Any, tokens: Any, sites: Sites, source: Any, metrics: list[Measure], options: Any) -> str:
    """What a saved result must agree with to be gone on with: a digest of the sweep's definition.

    Of a cache only the kind is in it: its values would have to be read.
    """
    shown = tokens if isinstance(tokens, str) else np.asarray(tokens).tolist()
    digest = hashlib.sha256()
    keys = [metric.key() if isinstance(metric, Metric) else () for metric in metrics]
    named = [(type(metric).__name__, _called(metric), _code(metric)) for metric in metrics]
    source_key = (
        repr(source)
        if dataclasses.is_dataclass(source) and not hasattr(source, "activations")
        else type(source).__name__
    )
    for part in (getattr(model, "_identity", ""), shown, sites.sites, source_key, named, keys, options):
        _add(digest, part)
    return digest.hexdigest()[:32]


def _code(metric: Measure) -> Any:
    """What a function does, as far as its own code says: two lambdas have the same name."""
    code = getattr(metric, "__code__", None)
    return None if code is None else (code.co_code, repr(code.co_consts), repr(code.co_names))


def _add(digest: Any, part: Any) -> None:
    """Adds what a tuple or list holds; bytes (of arrays, perhaps large) as they are."""
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


def _earlier(save_to: Any, identity: str | None, resume: bool) -> SweepResult | None:
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
