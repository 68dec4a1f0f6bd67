"""Recomputes only what patches change: later layers, later positions, and what the metrics read.

One run of the corrupted prompt keeps every layer's residual stream, keys and values. The patched variants then go through
the model in batches. Each enters at the block and stage of its own hook point, with the positions from its first changed
one on; these attend to the kept keys and values before them. This is exact: only terms that are zero are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from graphlens.analysis.arrays import Array
from graphlens.engine.block_layout import RESID_POST
from graphlens.engine.block_pieces import BlockPieces
from graphlens.errors import InputError
from graphlens.experiments.entering import Entering
from graphlens.experiments.stages import Entry, Kept, Stage, Variant, entry
from graphlens.file.io_names import DISTANCE, LOCAL_MASK, MASK
from graphlens.file.names import in_block

MAX_BATCH_TOKENS = 1024  # how many tokens are computed at once, where a call does not say


@dataclass
class _Start:
    """Variants that start at the same position: their indices, and their arrays [variant, batch, position, ...].

    The arrays' names are those of ``Entering``. ``seen`` keeps what ``Recomputation.seen`` makes, by name, for a block with
    queries at all positions from the start on.
    """

    indices: list[int] = field(default_factory=list)
    arrays: dict[str, Array] = field(default_factory=dict)
    seen: dict[str, Array] = field(default_factory=dict)

    def join(self, indices: list[int], arrays: Mapping[str, Array]) -> None:
        if self.indices:
            self.arrays = {name: np.concatenate([self.arrays[name], new]) for name, new in arrays.items()}
        else:
            self.arrays = dict(arrays)
        self.indices = self.indices + indices


_Starts = dict[int, _Start]  # by first position


class Recomputation:
    """Carries patched variants to the last residual stream.

    Args:
        pieces: The model in pieces.
        kept: What is kept of the corrupted run.
        read: int64 [b, m], the only positions wanted at the end; None for all from each variant's first one on.
        max_tokens: How many tokens are computed at once.
        window: How many tokens back local layers see, themselves included; None where there are none.

    Attributes:
        batch: The number of prompts.
        end: The position after the last one that is computed.
    """

    def __init__(
        self, pieces: BlockPieces, kept: Kept, read: Array | None, max_tokens: int, window: int | None
    ) -> None:
        self._pieces, self._kept, self._read, self._window = pieces, kept, read, window
        self._layout, self._layers = pieces.layout, pieces.layout.n_layers
        self._last, self._max_tokens = in_block(self._layers - 1, RESID_POST), max_tokens
        self.batch, length = kept.tokens.shape
        self.end = length if read is None else int(read.max()) + 1
        # With few positions to read, the last block's queries and all after them are computed there alone.
        self._narrow = read is not None and 2 * read.shape[1] <= self.end and self._can_be_narrow(read)
        self._entering = Entering(pieces, kept, self.end)

    def _can_be_narrow(self, read: Array) -> bool:
        """Whether the last block's queries may be those at the positions read alone.

        Distances between queries and keys are the same for all prompts.
        """
        return bool((read == read[:1]).all()) or DISTANCE not in self._pieces.reads(self._layers - 1)

    def groups(self, variants: Sequence[Variant]) -> Iterator[list[Variant]]:
        """The variants in batches of at most ``max_tokens`` tokens, those that go through the same layers side by side.

        Args:
            variants: In any order. One that alone has more tokens is a batch of its own.
        """
        batch: list[Variant] = []
        tokens = 0
        for variant in sorted(variants, key=lambda v: (*entry(v.hook, self._layout), v.start, v.index)):
            more = self.batch * (self.end - variant.start)
            if batch and tokens + more > self._max_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append(variant)
            tokens += more
        if batch:
            yield batch

    def last_residuals(self, batch: Sequence[Variant]) -> Iterator[tuple[list[int], int, Array]]:
        """The last residual streams of a batch.

        Args:
            batch: Variants from ``groups``.

        Yields:
            (indices, first position, [variant, b, m, d_model] at the positions read, or at all from the first on).
            Where positions are read that lie before a variant's first one, they are the corrupted run's.
        """
        entering = self._entries(batch)
        starts: _Starts = {}
        for layer in range(min(layer for layer, _ in entering), self._layers):
            narrow = self._narrow and layer == self._layers - 1
            self._enter(starts, entering, layer, Stage.RESID_PRE)
            taken = ["resid_pre"]
            if self._layout.rotates(layer):
                taken.append("positions")
                for start, entered in starts.items():
                    shape = entered.arrays["resid_pre"].shape[:3]
                    entered.arrays["positions"] = self._entering.positions(start, shape).reshape(shape)
            _by_token(starts, taken, ["q", "k", "v"], lambda r, p=None, at=layer: self._pieces.compared(at, r, p))
            self._enter(starts, entering, layer, Stage.QKV)
            for start, entered in starts.items():
                self._attend(layer, start, entered, narrow)
            self._enter(starts, entering, layer, Stage.Z, narrow)
            # A block's resid_post is the next one's resid_pre.
            if self._layout.parallel:
                _by_token(
                    starts,
                    ["z", "resid_pre"],
                    ["resid_pre"],
                    lambda z, r, at=layer: [self._pieces.resid_post_of(at, z, r)],
                )
                continue
            _by_token(
                starts, ["z", "resid_pre"], ["resid_mid"], lambda z, r, at=layer: [self._pieces.resid_mid(at, z, r)]
            )
            self._enter(starts, entering, layer, Stage.RESID_MID, narrow)
            _by_token(starts, ["resid_mid"], ["resid_pre"], lambda m, at=layer: [self._pieces.resid_post(at, m)])
        self._enter(starts, entering, self._layers, Stage.RESID_PRE, self._narrow)
        for start, entered in starts.items():
            yield entered.indices, start, self._ended(entered.arrays["resid_pre"], start)

    def _entries(self, batch: Sequence[Variant]) -> dict[Entry, list[Variant]]:
        """The block and stage where variants join the others, which may be later than where they enter."""
        found: dict[Entry, list[Variant]] = {}
        for variant in batch:
            layer, stage = entry(variant.hook, self._layout)
            few = variant.stop is not None and variant.stop < self.end
            if stage == Stage.RESID_POST or (few and stage in (Stage.Z, Stage.RESID_MID)):
                # Its attention is done with: the rest of the block is computed where it changes.
                layer, stage = layer + 1, Stage.RESID_PRE
            if few and stage == Stage.RESID_PRE and layer < self._layers:
                stage = Stage.QKV  # with q, k and v computed where they change
            found.setdefault((layer, stage), []).append(variant)
        return found

    def _ended(self, residual: Array, start: int) -> Array:
        """The last residual at the positions read; those before a variant's first position are the corrupted run's."""
        if self._read is None:
            return residual
        residual = residual if self._narrow else self._at_read(residual, start)
        before = self._read < start
        if before.any():
            last = self._kept.activations[self._last]
            unchanged = np.take_along_axis(last, self._read[:, :, None], 1)
            residual = np.where(before[None, :, :, None], unchanged, residual)
        return residual

    def _at_read(self, array: Array, start: int) -> Array:
        """An array [variant, b, positions from ``start`` on, ...] at the positions read.

        Where a position lies before ``start`` the value means nothing; ``_ended`` replaces what comes of it.
        """
        assert self._read is not None
        local = np.maximum(self._read - start, 0)
        found: Array = array[:, np.arange(self.batch)[:, None], local]
        return found

    def _attend(self, layer: int, start: int, entered: _Start, narrow: bool) -> None:
        """Runs a block's attention for the variants of one start: z takes the place of q, k and v."""
        arrays = entered.arrays
        q, residual = arrays["q"], arrays["resid_pre"]
        queries = np.broadcast_to(np.arange(start, self.end), (self.batch, self.end - start))
        if narrow:
            assert self._read is not None
            q, residual, queries = self._at_read(q, start), self._at_read(residual, start), self._read
        names = self._layout.compared(layer)
        k, v = (self._whole(name, arrays[letter], start) for name, letter in zip(names[1:], "kv", strict=True))
        seen = {
            name: np.tile(each, (len(q), 1, 1, 1)) if each.ndim == 4 and len(each) > 1 else each
            for name, each in self._seen(layer, queries, {} if narrow else entered.seen).items()
        }
        z = self._pieces.z(layer, q.reshape(-1, *q.shape[2:]), k, v, seen)
        entered.arrays = {"resid_pre": residual, "z": z.reshape(q.shape)}

    def _whole(self, hook: str, new: Array, start: int) -> Array:
        """Keys or values of the whole sequence [variant * b, end, ...], from the kept ones and those from ``start`` on."""
        kept = self._kept.activations[hook][None, :, :start]
        whole = np.concatenate([np.broadcast_to(kept, (len(new), *kept.shape[1:])), new], 2) if start else new
        return whole.reshape(-1, *whole.shape[2:])

    def seen(self, layer: int) -> dict[str, Array]:
        """What a block's attention reads besides queries, keys and values, where all positions are queries.

        Args:
            layer: The block.

        Returns:
            What ``BlockPieces.z`` takes; masks are [b or 1, 1, end, end].
        """
        return self._seen(layer, np.broadcast_to(np.arange(self.end), (self.batch, self.end)), {})

    def _seen(self, layer: int, queries: Array, made: dict[str, Array]) -> dict[str, Array]:
        """The same for queries at these positions [b, queries]; ``made`` keeps what other blocks made for them."""
        reads = self._pieces.reads(layer)
        for name in reads - made.keys():
            away = np.arange(self.end) - queries[:, :, None]
            if name == DISTANCE:
                made[name] = np.minimum(away[0], 0).astype(self._kept.activations[self._last].dtype)
                continue
            near = (away <= 0) & (away > -self._reach(name))
            if self._kept.tokens.all() and (queries == queries[0]).all():
                made[name] = near[:1, None]
            else:
                made[name] = (near & self._kept.tokens[:, None, : self.end])[:, None]
        return {name: made[name] for name in reads}

    def _reach(self, mask: str) -> int:
        """How many tokens back a mask lets queries see, themselves included."""
        if mask == MASK:
            return self.end
        assert mask == LOCAL_MASK
        if self._window is None:
            raise InputError("its local layers have a window that its config does not name")
        return self._window

    # Entering

    def _enter(
        self,
        starts: _Starts,
        entering: Mapping[Entry, list[Variant]],
        layer: int,
        stage: Stage,
        narrow: bool = False,
    ) -> None:
        """Adds the variants that join here to those that start at the same position."""
        here: dict[tuple[int, int, str], list[Variant]] = {}
        for variant in entering.get((layer, stage), ()):
            stop = self.end if variant.stop is None else min(variant.stop, self.end)
            here.setdefault((variant.start, stop, variant.hook), []).append(variant)
        for (start, stop, hook), variants in here.items():
            arrays = self._entering.arrays(hook, start, variants)
            at, own = entry(hook, self._layout)
            if own in (Stage.Z, Stage.RESID_MID) and at < layer:
                arrays = {"resid_pre": self._entering.finished(at, start, stop, arrays)}
            if own != Stage.QKV and stage == Stage.QKV:
                arrays |= self._entering.begun(layer, start, stop, arrays["resid_pre"])
            if narrow:
                arrays = {name: self._at_read(array, start) for name, array in arrays.items()}
            starts.setdefault(start, _Start()).join([variant.index for variant in variants], arrays)


def _by_token(
    starts: _Starts, taken: Sequence[str], given: Sequence[str], work: Callable[..., Sequence[Array]]
) -> None:
    """Runs a piece that works token by token on the tokens of all starts at once: ``taken`` arrays in, ``given`` out.

    The arrays taken are dropped. Only q, k and v leave the residual stream, which attention is added to later.
    """
    if not starts:
        return
    parts = list(starts.values())
    counts = [int(np.prod(entered.arrays[taken[0]].shape[:3])) for entered in parts]
    rows = []
    for name in taken:
        flat = [
            entered.arrays[name].reshape(n, *entered.arrays[name].shape[3:])
            for entered, n in zip(parts, counts, strict=True)
        ]
        rows.append(np.concatenate(flat) if len(flat) > 1 else flat[0])
    results = work(*rows)
    offsets = np.cumsum([0, *counts])
    for entered, begin, end in zip(parts, offsets[:-1], offsets[1:], strict=True):
        shape = entered.arrays[taken[0]].shape[:3]
        kept = {"resid_pre": entered.arrays["resid_pre"]} if given == ["q", "k", "v"] else {}
        new = {name: r[begin:end].reshape(*shape, *r.shape[1:]) for name, r in zip(given, results, strict=True)}
        entered.arrays = {**kept, **new}
