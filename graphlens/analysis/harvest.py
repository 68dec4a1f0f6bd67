"""A finished harvest, opened: its activations by token, mapped from disk, in order or shuffled, and what was computed of them."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from graphlens.analysis import harvest_exits
from graphlens.analysis.arrays import Array, ArrayInput
from graphlens.analysis.harvest_batches import batches
from graphlens.analysis.harvest_column import Column
from graphlens.analysis.harvest_labels import Labels
from graphlens.analysis.harvest_means import direction, mean
from graphlens.analysis.probe import Probe, probe
from graphlens.analysis.reductions import Statistics, reduction_of
from graphlens.errors import InputError, InputKeyError, ModelFileError
from graphlens.file.harvest_files import (
    CORPUS,
    DOCUMENTS,
    FINISHED,
    POSITIONS,
    REDUCED,
    TOKENS,
    corpus_is_sound,
    damaged,
    read_finished,
    read_plan,
    read_results,
    shard_file,
)
from graphlens.file.harvest_folder import folder_of
from graphlens.file.safetensors import SafetensorsFile

if TYPE_CHECKING:
    from pathlib import Path

    import datasets
    import pyarrow as pa
    import ray.data

OPEN_AT_ONCE = 256  # shards that stay mapped: a process may map only so many files
_NAMED = 8  # hook points that an error names
_CHANGING = threading.Lock()  # held while the shards that stay mapped change


class Harvest:
    """A finished harvest, opened without reading it: ``len(h)`` tokens, ``h[hook][a:b]`` their activations [tokens, ...].

    Args:
        out: Its folder, or the URL that it was harvested to, whose shards are fetched to the cache folder when they are read.

    Attributes:
        path: Its folder; text for a URL.
        plan: What it was made of.
        names: The hook points, in firing order.
        starts: int64 [shards + 1], the first token of each shard, and the number of all.

    Raises:
        ModelFileError: It is no harvest, or one that is not finished.
    """

    def __init__(self, out: str | os.PathLike[str]) -> None:
        self._folder = folder_of(out)
        self.path: Path | str = self._folder.place
        self.plan = read_plan(self._folder)
        self._digests = read_finished(self._folder)
        if self._digests is None or len(self._digests) != len(self.plan.shards):
            raise ModelFileError(
                f"{self.path}: this harvest is not finished ({FINISHED} is missing or damaged). Go on with it: resume=True, or "
                "graphlens harvest --resume."
            )
        self.names = self.plan.names
        self.starts = np.asarray([*(shard[2] for shard in self.plan.shards), self.plan.tokens], np.int64)
        self._open: OrderedDict[int, dict[str, Array]] = OrderedDict()

    def __len__(self) -> int:
        return self.plan.tokens

    def __repr__(self) -> str:
        kept = f"{len(self.names)} hook points in {self.plan.dtype}" if self.plan.written else "no activations"
        return f"Harvest({str(self.path)!r}, {len(self):,} tokens, {kept}, {len(self.plan.shards)} shards)"

    def __reduce__(self) -> tuple[type[Harvest], tuple[str]]:
        return Harvest, (self._folder.everywhere,)  # another process maps the files itself

    def __contains__(self, name: object) -> bool:
        return name in self.names

    # What it holds

    def __getitem__(self, name: str) -> Column:
        """The activations of one hook point.

        Args:
            name: The hook point.

        Raises:
            InputKeyError: It was not harvested, or its activations were not written.
        """
        if name not in self.names:
            shown = f"{', '.join(self.names[:_NAMED])}{', ...' if len(self.names) > _NAMED else ''}"
            raise InputKeyError(f"{name!r} was not harvested. This harvest has {shown}.")
        if not self.plan.written:
            raise InputKeyError(
                f"{name!r}: this harvest holds statistics alone (h.reduced). Harvest again with keep=True."
            )
        return Column(self, name, self.plan.shapes[name], _dtype(self.plan.dtype))

    def column(self, name: str) -> Column:
        """An array by its name: a hook point, or "tokens", "documents" or "positions".

        Args:
            name: Its name.

        Raises:
            InputKeyError: There is none.
        """
        beside = {TOKENS: self.tokens, DOCUMENTS: self.documents, POSITIONS: self.positions}
        return beside[name] if name in beside else self[name]

    @property
    def tokens(self) -> Column:
        """int32 [tokens], the id of each."""
        return Column(self, TOKENS, (), np.dtype(np.int32))

    @property
    def documents(self) -> Column:
        """int64 [tokens], the place in the corpus of each token's document."""
        return Column(self, DOCUMENTS, (), np.dtype(np.int64))

    @property
    def positions(self) -> Column:
        """int32 [tokens], the place of each in the row that was run, from 0."""
        return Column(self, POSITIONS, (), np.dtype(np.int32))

    @property
    def n_documents(self) -> int:
        """The documents of the corpus, those included of which no token is kept."""
        return int(str(self.plan.corpus["documents"]))

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return self._folder.size()

    @cached_property
    def reduced(self) -> Mapping[str, Mapping[str, Array]]:
        """What was computed on the way: hook point -> statistic -> array.

        The statistics are "mean", "variance" and "covariance" (float32), "quantiles" [q, ...], "top_values" and "top_tokens"
        [k, ...]; the last are places in this harvest, -1 where there are fewer tokens.

        Raises:
            InputError: The harvest was made without ``reduce``.
            ModelFileError: Their file is missing or damaged.
        """
        if not self.plan.reductions:
            raise InputError(f"{self.path}: this harvest was made without reduce=, and has no statistics.")
        arrays = read_results(self._folder, REDUCED)
        if arrays is None:
            raise ModelFileError(f"{self._folder.at(REDUCED)}: missing or damaged. Resume the harvest.")
        kinds = [reduction_of(spec) for spec in self.plan.reductions]
        found = Statistics(kinds, {name: self.plan.width(name) for name in self.names})
        found.restore(arrays)
        return found.results(self.plan.shapes)

    def verify(self) -> list[str]:
        """Reads every byte, and tells which files are not what was written.

        Returns:
            A sentence for each that is missing or damaged: none where all are sound. Resuming the harvest makes shards again.
        """
        lost = f"{CORPUS}: missing, or other bytes than were written"
        found = [] if corpus_is_sound(self._folder, self.plan) else [lost]
        found += [f"{shard_file(i)}: {why}" for i, why in damaged(self._folder, self.plan, self._digests or [])]
        if self.plan.reductions and read_results(self._folder, REDUCED) is None:
            found.append(f"{REDUCED}: missing or damaged")
        return found

    # Shards

    def shard(self, index: int) -> Mapping[str, Array]:
        """The arrays of one shard, mapped read-only.

        Args:
            index: Which.

        Returns:
            Hook points, "tokens", "documents" and "positions" -> [tokens, ...].

        Raises:
            ModelFileError: Its file is missing, or not as long as it was.
        """
        with _CHANGING:  # taken out and put back at the end: those used longest ago go
            found = self._open.pop(index, None)
        if found is None:
            digest = None if self._digests is None else self._digests[index]
            file = SafetensorsFile(self._folder.mapped(shard_file(index), digest))
            found = {name: file.array(name) for name in file.entries}
            if self.plan.dtype == "bfloat16":
                found |= {name: found[name].view(ml_dtypes.bfloat16) for name in self.names if name in found}
            if any(len(array) != self.plan.shards[index][3] for array in found.values()):
                raise ModelFileError(f"{self._folder.at(shard_file(index))}: not the plan's shard. Resume the harvest.")
        with _CHANGING:
            self._open[index] = found
            while len(self._open) > OPEN_AT_ONCE:
                self._open.popitem(last=False)
        return found

    # Reading all of it

    def batches(
        self,
        size: int,
        names: str | Sequence[str] | None = None,
        *,
        seed: int | None = 0,
        drop_last: bool = False,
        buffer_bytes: int = 256_000_000,
    ) -> Iterator[dict[str, Array]]:
        """All tokens once, shuffled across shards, in batches.

        Neighbouring tokens are read together: a buffer is filled with short stretches from everywhere, its tokens are mixed, and
        batches are cut from it. A small harvest is one buffer, and so shuffled completely.

        Args:
            size: Tokens of a batch.
            names: Which hook points, or also "tokens", "documents", "positions"; by default all hook points.
            seed: Decides the order; None keeps that of the corpus.
            drop_last: True leaves out a last batch that is not full.
            buffer_bytes: How much is mixed at once, and about what memory holds.

        Yields:
            Name -> [size, ...].

        Raises:
            InputKeyError: One of the names was not harvested.
        """
        asked = self.names if names is None else [names] if isinstance(names, str) else names
        columns = {name: self.column(name) for name in asked}
        return batches(
            self, {name: (c.shape[1:], c.dtype) for name, c in columns.items()}, size, seed, drop_last, buffer_bytes
        )

    def to_arrow(self, names: str | Sequence[str] | None = None) -> pa.Table:
        """A table of all tokens over the mapped files, for Polars (``pl.from_arrow``), DuckDB and others.

        Args:
            names: Its columns: hook points, "tokens", "documents", "positions"; by default all of these.

        Returns:
            A pyarrow.Table. Activations are lists of fixed size. Nothing is copied, except bfloat16, which becomes float32.

        Raises:
            RuntimeUnavailable: Without the package pyarrow.
        """
        return harvest_exits.to_arrow(self, names)

    def to_datasets(self, names: str | Sequence[str] | None = None) -> datasets.Dataset:
        """The same as a Hugging Face dataset.

        Args:
            names: See ``to_arrow``.

        Raises:
            RuntimeUnavailable: Without the package datasets.
        """
        return harvest_exits.to_datasets(self, names)

    def to_torch(self, names: str | Sequence[str] | None = None) -> harvest_exits.TokenDataset:
        """The same as a dataset by place for ``torch.utils.data.DataLoader``, whose batches are dicts of tensors.

        Args:
            names: See ``to_arrow``. Bfloat16 becomes float32.
        """
        return harvest_exits.TokenDataset(self, names)

    def to_ray(self, names: str | Sequence[str] | None = None) -> ray.data.Dataset:
        """The same as a Ray Data dataset, a block or more for each shard, read by Ray's workers where they are needed.

        Every machine of the cluster must see the harvest: a shared path, or a URL.

        Args:
            names: See ``to_arrow``. Bfloat16 becomes float32.

        Raises:
            RuntimeUnavailable: Without Ray.
        """
        return harvest_exits.to_ray(self, names)

    def save_saelens(self, folder: str | os.PathLike[str], name: str) -> None:
        """Writes one hook point as SAELens's cached activations: a saved dataset with a row for each ``context`` tokens.

        Args:
            folder: The folder to write: absent, or empty.
            name: The hook point. Bfloat16 becomes float32.

        Raises:
            InputError: Rows have different lengths: harvest with ``pack=True`` or ``keep_pad=True``.
            RuntimeUnavailable: Without the package datasets.
        """
        harvest_exits.save_saelens(self, folder, name)

    # What is computed of all of it

    def mean(self, hook: str, labels: Labels | None = None, *, by: str | None = None) -> Array:
        """The mean activation: what mean ablation puts in its place, ``Patch(hook, h.mean(hook))``.

        A sweep takes it by ``graphlens.patching.HarvestMean(h)``. Memory holds a piece of the activations, not all.

        Args:
            hook: The hook point.
            labels: The mean of the tokens labelled True alone, as for ``direction``; None for all tokens.
            by: "position" for the mean at each place in the row that was run. With labels, what a label is of: "document" (None
                means that) or "token".

        Returns:
            float32 [*shape]; by position [positions, *shape], NaN at a position of which no token was kept.

        Raises:
            InputKeyError: The hook point was not harvested.
            InputError: The labels are not so many bools, none is True, or ``by`` is something else.
        """
        return mean(self, hook, labels, by)

    def direction(self, labels: Labels, hook: str, *, by: str = "document", unit: bool = False) -> Array:
        """The difference of means: where the activations of one kind of tokens are, seen from the others.

        The mass-mean direction of Marks and Tegmark (2023), "The Geometry of Truth". Memory holds a piece of the activations.

        Args:
            labels: True for one kind, False for the other, None for what is left out: an array or list with one for each document
                or token, a mapping from documents or tokens, or a function of each document's Record (``document``, ``tokens``,
                ``positions``), which gives its label, or by token one for each of its tokens.
            hook: The hook point.
            by: "document" or "token": what a label is of.
            unit: True for length 1.

        Returns:
            float32 [*shape]: the mean at True less the mean at False.

        Raises:
            InputKeyError: The hook point was not harvested.
            InputError: The labels are not so many bools, no token is of one of the kinds, or an activation is not finite.
        """
        return direction(self, labels, hook, by, unit)

    def probe(
        self,
        labels: Labels,
        hook: str,
        *,
        by: str = "document",
        kind: str = "logistic",
        l2: float = 0.01,
        test: float = 0.2,
        groups: ArrayInput | None = None,
        seed: int = 0,
        confidence: float = 0.95,
    ) -> Probe:
        """What a linear probe can read off the activations, tried on documents that it was not made of.

        Whole documents are held out, a share of those of each label. Memory holds a piece of the activations, two matrices
        [width, width], and a number for each labelled token: a harvest may be larger.

        Args:
            labels: See ``direction``.
            hook: The hook point.
            by: "document" or "token": what a label is of.
            kind: "logistic" or "ridge" regression on activations scaled to standard deviation 1, or "mean": along the difference
                of means, from halfway between them.
            l2: How strongly large weights are held down, 1e-8 or more: mean loss + l2 / 2 * |w|^2. On n tokens scikit-learn calls
                it C = 1 / (l2 n), or alpha = l2 n. Of no effect on "mean".
            test: The share of documents that is held out, 0.01 to 0.99.
            groups: A number or text for each document: those with the same one (a template, a name, a source) stay on one side.
                With ``pack=True`` documents of one row see one another: what that tells, a group keeps out.
            seed: Decides which documents are held out.
            confidence: Of the intervals, between 0 and 1.

        Returns:
            The probe: ``direction``, ``bias``, ``accuracy``, ``auc``, ``held_out``, ``predict(activations)``.

        Raises:
            InputKeyError: The hook point was not harvested.
            InputError: The labels are not so many bools, one kind is missing in one of the parts, or an activation is not finite.
        """
        return probe(self, labels, hook, by, kind, l2, test, groups, seed, confidence)


def _dtype(name: str) -> np.dtype[np.generic]:
    """The NumPy dtype of a harvest's."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
