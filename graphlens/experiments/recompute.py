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
from graphlens.engine.block_pieces import BlockPieces
from graphlens.experiments.stages import ATTENTION, QKV, Stage, Variant
from graphlens.file.names import in_block, split_name

MAX_BATCH_TOKENS = 1024  # how many tokens are computed at once, where a call does not say


@dataclass
class _Start:
    """Variants that start at the same position: their indices, and their arrays [variant, batch, position, ...].

    The arrays' names are "resid_pre", "q", "k", "v", "z" and "resid_mid".
    """

    indices: list[int] = field(default_factory=list)
    arrays: dict[str, Array] = field(default_factory=dict)

    def join(self, indices: list[int], arrays: Mapping[str, Array]) -> None:
        if self.indices:
            self.arrays = {name: np.concatenate([self.arrays[name], new]) for name, new in arrays.items()}
        else:
            self.arrays = dict(arrays)
        self.indices = self.indices + indices


_Starts = dict[int, _Start]  # by first position


@dataclass(frozen=True)
class Kept:
    """What is kept of the corrupted run.

    Attributes:
        activations: By hook name.
        tokens: bool [b, p], True at real tokens.
        patched: What the patches put in place, by hook name; broadcasts to the activation.
    """

    activations: Mapping[str, Array]
    tokens: Array
    patched: Mapping[str, Array]


class Recomputation:
    """Carries patched variants to the last residual stream.

    Args:
        pieces: The model in pieces.
        kept: What is kept of the corrupted run.
        n_layers: The number of blocks.
        read: int64 [b, m], the only positions wanted at the end; None for all from each variant's first one on.
        max_tokens: How many tokens are computed at once.

    Attributes:
        batch: The number of prompts.
        end: The position after the last one that is computed.
    """

    def __init__(self, pieces: BlockPieces, kept: Kept, n_layers: int, read: Array | None, max_tokens: int) -> None:
        self._pieces, self._kept, self._layers, self._read = pieces, kept, n_layers, read
        self._max_tokens = max_tokens
        self.batch, length = kept.tokens.shape
        self.end = length if read is None else int(read.max()) + 1
        # With few positions to read, the last block's queries and all after them are computed there alone.
        self._narrow = read is not None and 2 * read.shape[1] <= self.end

    def groups(self, variants: Sequence[Variant]) -> Iterator[list[Variant]]:
        """The variants in batches of at most ``max_tokens`` tokens, those that go through the same layers side by side.

        Args:
            variants: In any order. One that alone has more tokens is a batch of its own.
        """
        batch: list[Variant] = []
        tokens = 0
        for variant in sorted(variants, key=lambda v: (*v.entry, v.start, v.index)):
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
            _by_token(starts, ["resid_pre"], ["q", "k", "v"], lambda r, at=layer: self._pieces.qkv(at, r))
            self._enter(starts, entering, layer, Stage.QKV)
            for start, entered in starts.items():
                self._attend(layer, start, entered, narrow)
            self._enter(starts, entering, layer, Stage.Z, narrow)
            _by_token(
                starts, ["z", "resid_pre"], ["resid_mid"], lambda z, r, at=layer: [self._pieces.resid_mid(at, z, r)]
            )
            self._enter(starts, entering, layer, Stage.RESID_MID, narrow)
            # A block's resid_post is the next one's resid_pre.
            _by_token(starts, ["resid_mid"], ["resid_pre"], lambda m, at=layer: [self._pieces.resid_post(at, m)])
        self._enter(starts, entering, self._layers, Stage.RESID_PRE, self._narrow)
        for start, entered in starts.items():
            yield entered.indices, start, self._ended(entered.arrays["resid_pre"], start)

    def _entries(self, batch: Sequence[Variant]) -> dict[tuple[int, Stage], list[Variant]]:
        """The block and stage where variants join the others, which may be later than where they enter."""
        found: dict[tuple[int, Stage], list[Variant]] = {}
        for variant in batch:
            layer, stage = variant.entry
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
            last = self._kept.activations[in_block(self._layers - 1, "hook_resid_post")]
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
        k, v = (self._whole(in_block(layer, QKV[letter]), arrays[letter], start) for letter in "kv")
        mask = self._mask(queries)
        mask = mask if len(mask) == 1 else np.tile(mask, (q.shape[0], 1, 1, 1))
        z = self._pieces.z(layer, q.reshape(-1, *q.shape[2:]), k, v, mask)
        entered.arrays = {"resid_pre": residual, "z": z.reshape(q.shape)}

    def _whole(self, hook: str, new: Array, start: int) -> Array:
        """Keys or values of the whole sequence [variant * b, end, ...], from the kept ones and those from ``start`` on."""
        kept = self._kept.activations[hook][None, :, :start]
        whole = np.concatenate([np.broadcast_to(kept, (len(new), *kept.shape[1:])), new], 2) if start else new
        return whole.reshape(-1, *whole.shape[2:])

    def mask(self) -> Array:
        """The mask of whole sequences, bool [b or 1, 1, end, end], True where a query may look."""
        return self._mask(np.broadcast_to(np.arange(self.end), (self.batch, self.end)))

    def _mask(self, queries: Array) -> Array:
        """bool [b or 1, 1, queries, end]: which keys the queries at these positions [b, queries] may see."""
        causal = np.arange(self.end) <= queries[:, :, None]
        if self._kept.tokens.all() and (queries == queries[0]).all():
            found: Array = causal[:1, None]
        else:
            found = (causal & self._kept.tokens[:, None, : self.end])[:, None]
        return found

    # Entering

    def entering(self, variant: Variant) -> dict[str, Array]:
        """The arrays with which one variant enters.

        Args:
            variant: The patched run.

        Returns:
            Name ("resid_pre", "q", "k", "v", "z", "resid_mid") -> [1, b, position, ...].
        """
        return self._arrays(variant.hook, variant.start, [variant])

    def _enter(
        self,
        starts: _Starts,
        entering: Mapping[tuple[int, Stage], list[Variant]],
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
            arrays = self._arrays(hook, start, variants)
            at, own = variants[0].entry
            if own in (Stage.Z, Stage.RESID_MID) and at < layer:
                arrays = {"resid_pre": self._finished(at, start, stop, arrays)}
            if own != Stage.QKV and stage == Stage.QKV:
                arrays |= self._begun(layer, start, stop, arrays["resid_pre"])
            if narrow:
                arrays = {name: self._at_read(array, start) for name, array in arrays.items()}
            starts.setdefault(start, _Start()).join([variant.index for variant in variants], arrays)

    def _finished(self, layer: int, start: int, stop: int, arrays: Mapping[str, Array]) -> Array:
        """A block's resid_post from a position on, where only positions before ``stop`` change."""
        few = {name: array[:, :, : stop - start] for name, array in arrays.items()}
        shape = next(iter(few.values())).shape[:3]
        rows = {name: np.ascontiguousarray(array).reshape(-1, *array.shape[3:]) for name, array in few.items()}
        middle = (
            rows["resid_mid"] if "resid_mid" in rows else self._pieces.resid_mid(layer, rows["z"], rows["resid_pre"])
        )
        after = self._pieces.resid_post(layer, middle)
        return self._replaced(in_block(layer, "hook_resid_post"), start, after, shape)

    def _begun(self, layer: int, start: int, stop: int, residual: Array) -> dict[str, Array]:
        """q, k and v of a block from a position on, where only positions before ``stop`` change."""
        few = np.ascontiguousarray(residual[:, :, : stop - start])
        found = self._pieces.qkv(layer, few.reshape(-1, few.shape[-1]))
        return {
            letter: self._replaced(in_block(layer, name), start, new, few.shape[:3])
            for (letter, name), new in zip(QKV.items(), found, strict=True)
        }

    def _replaced(self, name: str, start: int, new: Array, shape: tuple[int, ...]) -> Array:
        """The corrupted activation from a position on [1 or variant, b, ...], its first positions replaced by ``new``."""
        whole = np.repeat(self._from(name, start), shape[0], 0)
        whole[:, :, : shape[2]] = new.reshape(*shape, *new.shape[1:])
        return whole

    def _from(self, name: str, start: int) -> Array:
        """The corrupted activation from a position on [1, b, positions, ...]."""
        found: Array = self._kept.activations[name][None, :, start : self.end]
        return found

    def _edited(self, hook: str, start: int, variants: Sequence[Variant], axis: int = 1) -> tuple[Array, Array]:
        """(the corrupted activation from a position on [1, b, ...], the patched ones [variant, b, ...])."""
        whole = self._kept.activations[hook]
        place = (slice(None),) * axis + (slice(start, self.end),)
        old, new = whole[place], np.broadcast_to(self._kept.patched[hook], whole.shape)[place]
        edited = np.stack([np.where(np.broadcast_to(v.chosen, whole.shape)[place], new, old) for v in variants])
        return old[None], edited.astype(old.dtype, copy=False)

    def _arrays(self, hook: str, start: int, variants: Sequence[Variant]) -> dict[str, Array]:
        """The arrays with which variants of one hook point and first position enter."""
        layer_or_none, rest = split_name(hook)
        layer, count = layer_or_none or 0, len(variants)

        def kept(name: str) -> Array:
            return self._from(in_block(layer, name), start)

        def repeated(name: str) -> Array:
            return np.repeat(kept(name), count, 0)

        if rest in ATTENTION:
            _, weights = self._edited(hook, start, variants, axis=2)
            weights = np.ascontiguousarray(weights[..., : self.end]).reshape(-1, *weights.shape[2:4], self.end)
            v = np.repeat(self._from(in_block(layer, "attn.hook_v"), 0), count, 0)
            z = self._pieces.z_from(hook, layer, weights, v.reshape(-1, *v.shape[2:]))
            return {"resid_pre": repeated("hook_resid_pre"), "z": z.reshape(count, -1, *z.shape[1:])}
        old, edited = self._edited(hook, start, variants)
        match rest:
            case "hook_resid_pre" | "hook_resid_post":
                return {"resid_pre": edited}
            case "hook_embed" | "hook_pos_embed":
                return {"resid_pre": kept("hook_resid_pre") + (edited - old)}
            case "hook_mlp_out":
                return {"resid_pre": kept("hook_resid_post") + (edited - old)}
            case "mlp.hook_pre" | "mlp.hook_post":
                rows = [array.reshape(-1, array.shape[-1]) for array in (edited, repeated("hook_resid_mid"))]
                after = self._pieces.resid_post_from(hook, layer, *rows)
                return {"resid_pre": after.reshape(*edited.shape[:3], -1)}
            case "hook_resid_mid":
                return {"resid_mid": edited}
            case "hook_attn_out":
                return {"resid_mid": kept("hook_resid_mid") + (edited - old)}
            case "attn.hook_result":
                return {"resid_mid": kept("hook_resid_mid") + (edited - old).sum(3)}
            case "attn.hook_z":
                return {"resid_pre": repeated("hook_resid_pre"), "z": edited}
        found = {letter: edited if name == rest else repeated(name) for letter, name in QKV.items()}
        return {"resid_pre": repeated("hook_resid_pre"), **found}


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
