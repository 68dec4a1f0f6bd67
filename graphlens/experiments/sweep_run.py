"""Running a sweep: what it needs of the corrupted run, which of its sites can be recomputed, and its metrics' values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens.analysis.metrics import Metric
from graphlens.analysis.sites import Site
from graphlens.analysis.sources import Source
from graphlens.edits import gate
from graphlens.edits.gate import Window
from graphlens.engine.block_pieces import Pieces
from graphlens.errors import GraphlensError, InputError
from graphlens.experiments.recompute import STAGES, Corrupted, Recomputation, Variant, needed, position_axis
from graphlens.experiments.sweep import MAX_BATCH_TOKENS, Measure
from graphlens.experiments.sweep_metrics import Measuring, called
from graphlens.file.names import SCORES, UNEMBEDDED, axis_sizes, select, split_name
from graphlens.model.active import InterventionMethods
from graphlens.model.request import Request

Array = npt.NDArray[Any]
Done = tuple[list[int], list[Array]]  # indices of sites, and for each metric their values [site] or [site, b]
_PROBES = 8  # tokens
_PROVED = 1e-4  # of the largest residual: beyond it the pieces are not the model


@dataclass
class SweepRun:
    """A sweep under way. Iterating computes it: (site indices, their values for each metric) as they are done.

    ``corrupted`` and ``clean`` are the metrics' baselines (clean ones None where the source does not tell them);
    ``notes`` says why sites went by the general path, one forward per patch; ``quick`` counts those that did not.
    """

    metrics: list[Measure]
    corrupted: list[Array]
    clean: list[Array | None]
    notes: list[str]
    quick: int
    steps: Iterator[Done]

    def __iter__(self) -> Iterator[Done]:
        return self.steps


class SweepMethods(InterventionMethods):
    """The part of HookedTransformer that runs sweeps for graphlens.patching."""

    def _sweep(
        self,
        corrupted: Any,
        sites: Sequence[Site],
        source: Source,
        metrics: Sequence[Measure],
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        recompute: bool = True,
        **forward_options: Any,
    ) -> SweepRun:
        """Checks everything, runs the corrupted prompt once, and hands back the sweep to iterate over."""
        if not isinstance(max_batch_tokens, (int, np.integer)) or max_batch_tokens < 1:
            raise InputError(f"max_batch_tokens={max_batch_tokens!r}: it must be at least 1, a number of tokens.")
        request, sites = self._whole_prompts(corrupted, forward_options), self._resolved_sites(sites)
        return Sweeper(self, request, sites, source, metrics, max_batch_tokens, recompute).start()

    def _whole_prompts(self, corrupted: Any, forward_options: Mapping[str, Any]) -> Request:
        request = self._request(corrupted, **forward_options)
        if request.tokens is None or request.plan.stop is not None or request.cache is not None:
            raise InputError("a sweep runs whole prompts: without start_at_layer, stop_at_layer and past_kv_cache.")
        return request

    def _resolved_sites(self, sites: Sequence[Site]) -> list[Site]:
        """The sites under their hook points' own names. Raises UnknownHookPoint, InputError for a part that is not there."""
        names, entries = self._engine.names(self._plan()), self._engine.hooks(self._plan())
        config = self._engine.manifest.config
        sizes = axis_sizes(config)
        known: dict[str, str] = {}
        found = []
        for site in sites:
            if site.hook not in known:
                (known[site.hook],) = select(names, site.hook, config.n_layers)
            name = known[site.hook]
            site = site if name == site.hook else Site(name, None, site.position, site.head, site.dims)
            entry = entries[name]
            if not _plainly_there(site, entry.axes, sizes):
                value = 0 if entry.dtype.startswith("int") else 0.0  # the source's own come later
                gate.check([site.patch(value)], entry, sizes)
            found.append(site)
        return found

    def _standing_edits(self) -> tuple[Any, ...]:
        """What stands in this thread beside the model: flags, interventions, and hooks by where and what they are."""
        items = tuple(item for model, some in self._standing.get() if model == id(self) for item in some)
        hooks = tuple((hook.name, getattr(hook.user_hook, "__qualname__", "")) for hook in self._hooks.standing())  # type: ignore[attr-defined]
        return (tuple(sorted(self._flags)), tuple(item.key() for item in items), hooks)

    def _stands_alone(self) -> bool:
        """Whether runs are the plain model's: no hooks, no interventions."""
        return not any(self._standing_edits()[1:])


class Sweeper:
    """One sweep of one model. ``also``: hook points that the corrupted run keeps besides those it needs."""

    def __init__(
        self,
        model: Any,
        request: Request,
        sites: Sequence[Site],
        source: Source,
        metrics: Sequence[Measure],
        max_tokens: int,
        recompute: bool,
        also: Sequence[str] = (),
    ) -> None:
        assert request.tokens is not None
        self._model, self._request, self._sites, self._max_tokens = model, request, sites, max_tokens
        self._engine = model._engine
        self._config = self._engine.manifest.config
        self._batch, self._length = request.shape
        self._mask = np.ones(request.shape, bool) if request.mask is None else request.mask.astype(bool)
        self.notes: list[str] = []
        hooks = list(dict.fromkeys(site.hook for site in sites))
        quick = [hook for hook in hooks if recompute and split_name(hook)[1] in STAGES]
        if not recompute:
            self.notes.append("recompute=False")
        elif not model._stands_alone():
            self.notes.append("hooks or interventions are active, which only whole runs honour")
            quick = []
        elif len(quick) < len(hooks):
            others = sorted({split_name(hook)[1] for hook in hooks} - set(STAGES))
            self.notes.append(f"no shortcut from {', '.join(others)}")
        kept = needed(quick, self._config.n_layers) if quick else []
        if quick and not self._proof:
            kept += needed(["blocks.0.hook_resid_pre"], self._config.n_layers)
        logits, self._base = model._execute(request, list(dict.fromkeys([*kept, *hooks, *also])), True)
        mask = request.mask
        self._patched = {h: _unmasked(h, source.value(h, self._base[h], mask), self._base[h]) for h in hooks}
        self._measuring = Measuring(model, request.shape, metrics, logits, source)
        self._metrics = self._measuring.metrics
        self.corrupted, self.clean = self._measuring.corrupted, self._measuring.clean
        self._logits = None if all(isinstance(metric, Metric) for metric in self._metrics) else logits
        self._quick = set(quick)
        self._probed = np.linspace(0, self._config.d_vocab - 1, _PROBES, dtype=np.int64)
        self._probe = logits[:, -1:, self._probed].copy()  # what W_U alone must give too
        self._differences: dict[str, Array] = {}

    def start(self) -> SweepRun:
        """The sweep, ready to iterate over."""
        variants: list[Variant] = []
        idle: list[int] = []
        general: list[int] = []
        for index, site in enumerate(self._sites):
            variant = self._variant(index, site) if site.hook in self._quick else None
            if variant is not None:
                variants.append(variant)
            else:
                (general if site.hook not in self._quick else idle).append(index)
        read = self._measuring.read()
        carrier = None
        if variants:
            pieces = Pieces(self._engine, self._max_tokens)
            run = Corrupted(self._base, self._mask, self._patched)
            carrier = Recomputation(pieces, run, self._config.n_layers, read, self._max_tokens)
            # What starts after the last position read changes nothing there.
            idle += [variant.index for variant in variants if variant.start >= carrier.end]
            variants = [variant for variant in variants if variant.start < carrier.end]
            why = self._unproved(pieces)
            if why:
                self.notes.append(why)
                general += [variant.index for variant in variants]
                variants = []
        quick = len(idle) + len(variants)
        steps = self._steps(idle, variants, sorted(general), carrier)
        return SweepRun(self._metrics, self.corrupted, self.clean, self.notes, quick, steps)

    # The quick path

    def _variant(self, index: int, site: Site) -> Variant | None:
        """The patched run of a site; None where the patch puts what is there already."""
        base = self._base[site.hook]
        entry = self._engine.hooks(self._request.plan)[site.hook]
        window = Window(self._batch, 0, self._length, self._length, self._length)
        sizes = axis_sizes(self._config)
        parts = gate.compose([site.patch()], entry, sizes, window)
        if "where" not in parts:
            return None
        chosen = parts["where"]
        axis = position_axis(site.hook)
        changed = (chosen & self._changed(site.hook)).any(tuple(i for i in range(base.ndim) if i != axis))
        if not changed.any():
            return None
        places = np.flatnonzero(changed)
        return Variant(index, site.hook, chosen, int(places[0]), int(places[-1]) + 1)

    def _changed(self, hook: str) -> Array:
        """Which elements the patch would change, bool, shaped like the activation."""
        if hook not in self._differences:
            self._differences[hook] = np.asarray(self._patched[hook] != self._base[hook])
        found: Array = self._differences[hook]
        return found

    def _unproved(self, pieces: Pieces) -> str:
        """Why the pieces are not to be trusted, after running the corrupted prompt through them; "" where they are."""
        if not self._proof:
            self._proof["why"] = self._tried(pieces)
            self._proof["unembedding"] = "" if self._proof["why"] else self._tried_unembedding(pieces)
        return self._proof["why"]

    @property
    def _proof(self) -> dict[str, str]:
        """What the engine's first sweep found out; empty until then."""
        found: dict[str, str] = self._engine.__dict__.setdefault("_pieces_proved", {})
        return found

    def _tried(self, pieces: Pieces) -> str:
        last = f"blocks.{self._config.n_layers - 1}.hook_resid_post"
        start = self._length // 2
        hook = "blocks.0.hook_resid_pre"
        run = Corrupted(self._base, self._mask, {hook: self._base[hook]})
        whole = Recomputation(pieces, run, self._config.n_layers, None, self._max_tokens)
        same = Variant(0, hook, np.zeros((1, 1, 1), bool), start)
        try:
            ((_, _, found),) = whole.last_residuals([same])
        except GraphlensError as error:
            return f"this model does not come apart into blocks ({error})"
        wanted = self._base[last][:, start:]
        apart = float(np.abs(found[0] - wanted).max())
        return "" if apart <= _PROVED * float(np.abs(wanted).max()) else f"the blocks are {apart:.1e} off the model"

    def _tried_unembedding(self, pieces: Pieces) -> str:
        """ "W_U" where the logits are unembed.hook_in times W_U plus b_U, and nothing besides; else ""."""
        if not all(self._model._has_weight(f"unembed.{name}") for name in ("W_U", "b_U")):
            return ""
        last = self._base[f"blocks.{self._config.n_layers - 1}.hook_resid_post"][:, -1]
        hidden = pieces.end(np.ascontiguousarray(last), UNEMBEDDED)[None, :, None]
        found = self._columns(hidden, np.broadcast_to(self._probed, (self._batch, _PROBES)))[0]
        apart = float(np.abs(found - self._probe).max())
        return "W_U" if apart <= _PROVED * max(float(np.abs(self._probe).max()), 1e-3) else ""

    def _steps(
        self, idle: list[int], variants: list[Variant], general: list[int], carrier: Recomputation | None
    ) -> Iterator[Done]:
        if idle:
            yield idle, [np.broadcast_to(base, (len(idle), *base.shape)) for base in self.corrupted]
        if carrier is not None:
            for group in carrier.groups(variants):
                for indices, start, residual in carrier.last_residuals(group):
                    yield indices, self._values(carrier, indices, start, residual)
        for index in general:
            yield [index], [value[None] for value in self._whole_run(self._sites[index])]

    def _values(self, carrier: Recomputation, indices: list[int], start: int, residual: Array) -> list[Array]:
        """Each metric's values [variant] or [variant, b] from last residuals [variant, b, m, d_model]."""
        if self._logits is not None:
            return self._values_of_logits(carrier, start, residual)
        offset, found = 0, []
        read = self._measuring.read()
        for metric in self._metrics:
            assert isinstance(metric, Metric)
            needs = metric.needs(self._batch, self._length)
            if read is None:  # all positions of one metric: those before the first are the corrupted run's
                here = self._with_earlier(residual, start)
                here = here if needs.positions is None else self._at(here, needs.positions)
            else:
                assert needs.positions is not None
                count = needs.positions.shape[-1]
                here, offset = residual[:, :, offset : offset + count], offset + count
            if needs.tokens is None or not self._has_unembedding:
                values = self._in_slices(carrier, metric, here)
            else:
                hidden = self._ended(carrier, here, UNEMBEDDED)
                values = metric.of(self._columns(hidden, needs.tokens))
            values = metric.reduced(values)
            if np.isnan(values).any():
                raise InputError(
                    f"the metric {called(metric)} is NaN at {self._sites[indices[int(np.isnan(values).argmax())]]}."
                )
            found.append(values)
        return found

    @property
    def _has_unembedding(self) -> bool:
        return self._proof.get("unembedding") == "W_U"

    def _columns(self, hidden: Array, tokens: Array) -> Array:
        """Logits [variant, b, m, k] of tokens [b, k] alone."""
        # Rows of the transpose: taken as columns, the whole matrix would be copied first.
        columns = self._model._weight("unembed.W_U").T[tokens].astype(hidden.dtype)  # [b, k, D]
        bias = self._model._weight("unembed.b_U")[tokens].astype(hidden.dtype)
        found: Array = np.matmul(hidden, columns.transpose(0, 2, 1)) + bias[:, None]
        return found

    def _ended(self, carrier: Recomputation, residual: Array, output: str) -> Array:
        flat = residual.reshape(-1, residual.shape[-1])
        found = carrier._pieces.end(flat, output)
        return found.reshape(*residual.shape[:-1], -1)

    def _in_slices(self, carrier: Recomputation, metric: Metric, residual: Array) -> Array:
        """A metric's values [variant, b] through whole logits, no more of them at once than a run of the prompt has."""
        some = max(1, self._length // residual.shape[2])
        needs = metric.needs(self._batch, self._length)
        parts = []
        for start in range(0, len(residual), some):
            logits = self._ended(carrier, residual[start : start + some], "logits")
            if needs.tokens is not None:
                logits = np.take_along_axis(logits, needs.tokens[None, :, None], -1)
            parts.append(metric.of(logits))
        return np.concatenate(parts)

    def _with_earlier(self, residual: Array, start: int) -> Array:
        """Last residuals of every position, those before ``start`` the corrupted run's."""
        last = self._base[f"blocks.{self._config.n_layers - 1}.hook_resid_post"][None, :, :start]
        return np.concatenate([np.broadcast_to(last, (len(residual), *last.shape[1:])), residual], 2)

    def _at(self, residual: Array, positions: Array) -> Array:
        found: Array = residual[:, np.arange(self._batch)[:, None], positions]
        return found

    def _values_of_logits(self, carrier: Recomputation, start: int, residual: Array) -> list[Array]:
        """Values of metrics of which one is a function of whole logits: those before ``start`` are the corrupted run's."""
        assert self._logits is not None
        rows = []
        for variant in residual:
            logits = np.array(self._logits)
            logits[:, start:] = self._ended(carrier, variant, "logits")
            rows.append([self._measuring.of(metric, logits) for metric in self._metrics])
        return [np.stack(column) for column in zip(*rows, strict=True)]

    # The general path

    def _whole_run(self, site: Site) -> list[Array]:
        """One forward with the patch."""
        value = np.broadcast_to(self._patched[site.hook], self._base[site.hook].shape)
        with self._model.intervene(site.patch(value)):
            logits, _ = self._model._execute(self._request, (), True)
        return [self._measuring.of(metric, logits) for metric in self._metrics]


def _plainly_there(site: Site, axes: Sequence[str], sizes: Mapping[str, int]) -> bool:
    """Whether a site takes at most one head and one of the last axis, both there: most do, and thousands come at once."""
    heads = next((sizes[axis] for axis in axes if axis.endswith("head_index")), 0)
    last = sizes.get(axes[-1], 0)
    return (
        (site.head is None or (isinstance(site.head, int) and 0 <= site.head < heads))
        and (site.position is None or (isinstance(site.position, int) and "pos" in " ".join(axes)))
        and (site.dims is None or (isinstance(site.dims, int) and 0 <= site.dims < last))
    )


def _unmasked(hook: str, value: Array, base: Array) -> Array:
    """What is put in an activation's place: at scores masked entries (-inf) stay as they are, as they do at gates."""
    return np.where(np.isneginf(base), base, value) if split_name(hook)[1] == SCORES else value
