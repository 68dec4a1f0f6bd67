"""Sweeps that recompute only what a patch changes: later layers, later positions, and what the metric reads.

One run of the corrupted prompt keeps every layer's residual, keys and values. The patched variants then go through the
model in batches, each entering at its own layer and stage with the positions from its first changed one on, which attend
to the kept keys and values before them. Exact: no term is left out that is not zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens.engine.block_pieces import BlockPieces
from graphlens.file.names import split_name

Array = npt.NDArray[Any]


class Stage(IntEnum):
    """Where in a block a variant enters."""

    BEFORE = 0  # with the residual before the block
    HEADS = 1  # with that and q, k, v
    MIXED = 2  # with that and z
    BETWEEN = 3  # with the residual between attention and MLP
    AFTER = 4  # with the residual after the block


STAGES: Mapping[str, Stage] = {
    "hook_embed": Stage.BEFORE,
    "hook_pos_embed": Stage.BEFORE,
    "hook_resid_pre": Stage.BEFORE,
    "attn.hook_q": Stage.HEADS,
    "attn.hook_k": Stage.HEADS,
    "attn.hook_v": Stage.HEADS,
    "attn.hook_attn_scores": Stage.MIXED,
    "attn.hook_pattern": Stage.MIXED,
    "attn.hook_z": Stage.MIXED,
    "attn.hook_result": Stage.BETWEEN,
    "hook_attn_out": Stage.BETWEEN,
    "hook_resid_mid": Stage.BETWEEN,
    "mlp.hook_pre": Stage.AFTER,
    "mlp.hook_post": Stage.AFTER,
    "hook_mlp_out": Stage.AFTER,
    "hook_resid_post": Stage.AFTER,
}
_ATTENTION = ("attn.hook_attn_scores", "attn.hook_pattern")
_NEURONS = ("mlp.hook_pre", "mlp.hook_post")


def position_axis(hook: str) -> int:
    """The axis of an activation along which a change stays with later positions."""
    return 2 if split_name(hook)[1] in _ATTENTION else 1


def needed(hooks: Sequence[str], n_layers: int) -> list[str]:
    """What the corrupted run must keep for patches at these hook points, besides these."""
    kept = {f"blocks.{n_layers - 1}.hook_resid_post"}
    stages = {split_name(hook): STAGES[split_name(hook)[1]] for hook in hooks}
    first = min((layer or 0) for layer, _ in stages)
    for layer in range(first, n_layers):
        kept |= {f"blocks.{layer}.{name}" for name in ("hook_resid_pre", "attn.hook_k", "attn.hook_v")}
    for (block, rest), stage in stages.items():
        at = f"blocks.{block or 0}."
        if stage == Stage.HEADS:
            kept.add(f"{at}attn.hook_q")
        if stage == Stage.BETWEEN or rest in _NEURONS:
            kept.add(f"{at}hook_resid_mid")
        if stage in (Stage.MIXED, Stage.BETWEEN, Stage.AFTER):
            kept.add(f"{at}hook_resid_post")
        entered = (block or 0) + (0 if stage == Stage.BEFORE else 1)
        if stage != Stage.HEADS and entered < n_layers:
            kept.add(f"blocks.{entered}.attn.hook_q")
    return sorted(kept)


@dataclass(frozen=True)
class Variant:
    """A patched run: the hook point, which of its elements are patched (a mask that broadcasts to the activation), the
    first position that changes there, and the one after the last (None: all from the first on may)."""

    index: int
    hook: str
    chosen: Array
    start: int
    stop: int | None = None

    @property
    def entry(self) -> tuple[int, Stage]:
        """The block and the stage at which it enters."""
        layer, rest = split_name(self.hook)
        return layer or 0, STAGES[rest]


@dataclass
class _Block:
    """Variants that start at the same position: which, and their arrays [variant, batch, position, ...] by name."""

    indices: list[int] = field(default_factory=list)
    arrays: dict[str, Array] = field(default_factory=dict)

    def join(self, indices: list[int], arrays: Mapping[str, Array]) -> None:
        if self.indices:
            self.arrays = {name: np.concatenate([self.arrays[name], new]) for name, new in arrays.items()}
        else:
            self.arrays = dict(arrays)
        self.indices = self.indices + indices


_Blocks = dict[int, _Block]


@dataclass(frozen=True)
class Corrupted:
    """The corrupted run: activations by hook name, its token mask bool [b, pos], and where the patched values come from
    (hook name -> an array that broadcasts to the activation)."""

    activations: Mapping[str, Array]
    tokens: Array
    patched: Mapping[str, Array]


class Recomputation:
    """Carries variants to the last residual. ``read`` int64 [b, m] are the only positions wanted there, or None for all
    from each variant's first on."""

    def __init__(self, pieces: BlockPieces, run: Corrupted, n_layers: int, read: Array | None, max_tokens: int) -> None:
        self._pieces, self._run, self._layers, self._read = pieces, run, n_layers, read
        self._max_tokens = max_tokens
        self.batch, length = run.tokens.shape
        self.end = length if read is None else int(read.max()) + 1
        # With few positions to read, the last block's queries and all after them are computed there alone.
        self._narrow = read is not None and 2 * read.shape[1] <= self.end

    def groups(self, variants: Sequence[Variant]) -> Iterator[list[Variant]]:
        """The variants in batches of at most ``max_tokens`` tokens, those that go through the same layers together."""
        group: list[Variant] = []
        tokens = 0
        for variant in sorted(variants, key=lambda v: (*v.entry, v.start, v.index)):
            more = self.batch * (self.end - variant.start)
            if group and tokens + more > self._max_tokens:
                yield group
                group, tokens = [], 0
            group.append(variant)
            tokens += more
        if group:
            yield group

    def last_residuals(self, group: Sequence[Variant]) -> Iterator[tuple[list[int], int, Array]]:
        """(indices, first position, last residual [variant, b, m or positions from the first on, d_model]) of a group.

        Where positions are read that lie before a variant's first, theirs is the corrupted run's residual.
        """
        entering: dict[tuple[int, Stage], list[Variant]] = {}
        for variant in group:
            layer, stage = variant.entry
            few = variant.stop is not None and variant.stop < self.end
            if stage == Stage.AFTER or (few and stage in (Stage.MIXED, Stage.BETWEEN)):
                layer, stage = (
                    layer + 1,
                    Stage.BEFORE,
                )  # attention is done with: the rest of the block, where it changes
            if few and stage == Stage.BEFORE and layer < self._layers:
                stage = Stage.HEADS  # with q, k and v computed where they change
            entering.setdefault((layer, stage), []).append(variant)
        blocks: _Blocks = {}
        for layer in range(min(layer for layer, _ in entering), self._layers):
            narrow = self._narrow and layer == self._layers - 1
            self._enter(blocks, entering, layer, Stage.BEFORE)
            _rowwise(blocks, ["resid"], ["q", "k", "v"], lambda r, n=layer: self._pieces.qkv(n, r))
            self._enter(blocks, entering, layer, Stage.HEADS)
            for start, block in blocks.items():
                self._attend(layer, start, block, narrow)
            self._enter(blocks, entering, layer, Stage.MIXED, narrow)
            _rowwise(blocks, ["z", "resid"], ["mid"], lambda z, r, n=layer: [self._pieces.resid_mid(n, z, r)])
            self._enter(blocks, entering, layer, Stage.BETWEEN, narrow)
            _rowwise(blocks, ["mid"], ["resid"], lambda m, n=layer: [self._pieces.resid_post(n, m)])
        self._enter(blocks, entering, self._layers, Stage.BEFORE, self._narrow)
        for start, block in blocks.items():
            residual = block.arrays["resid"]
            if self._read is not None:
                residual = residual if self._narrow else self._at_read(residual, start)
                last = self._run.activations[f"blocks.{self._layers - 1}.hook_resid_post"]
                before = self._read < start
                if before.any():
                    unchanged = np.take_along_axis(last, self._read[:, :, None], 1)
                    residual = np.where(before[None, :, :, None], unchanged, residual)
            yield block.indices, start, residual

    def _at_read(self, array: Array, start: int) -> Array:
        """An array [variant, b, positions from ``start`` on, ...] at the positions read; anything where they lie before."""
        assert self._read is not None
        local = np.maximum(self._read - start, 0)
        found: Array = array[:, np.arange(self.batch)[:, None], local]
        return found

    def _attend(self, layer: int, start: int, block: _Block, narrow: bool) -> None:
        """Puts z in place of q, k and v."""
        arrays = block.arrays
        q, residual = arrays["q"], arrays["resid"]
        queries = np.broadcast_to(np.arange(start, self.end), (self.batch, self.end - start))
        if narrow:
            assert self._read is not None
            q, residual, queries = self._at_read(q, start), self._at_read(residual, start), self._read
        k, v = (self._whole(f"blocks.{layer}.attn.hook_{letter}", arrays[letter], start) for letter in "kv")
        variants = q.shape[0]
        mask = self._mask(queries)
        mask = mask if len(mask) == 1 else np.tile(mask, (variants, 1, 1, 1))
        z = self._pieces.z(layer, q.reshape(-1, *q.shape[2:]), k, v, mask)
        block.arrays = {"resid": residual, "z": z.reshape(q.shape)}

    def _whole(self, hook: str, new: Array, start: int) -> Array:
        """Keys or values of the whole sequence [variant * b, end, ...], from the kept ones and those from ``start`` on."""
        kept = self._run.activations[hook][None, :, :start]
        whole = np.concatenate([np.broadcast_to(kept, (len(new), *kept.shape[1:])), new], 2) if start else new
        return whole.reshape(-1, *whole.shape[2:])

    def mask(self) -> Array:
        """The mask of whole sequences, bool [b or 1, 1, end, end]."""
        return self._mask(np.broadcast_to(np.arange(self.end), (self.batch, self.end)))

    def _mask(self, queries: Array) -> Array:
        """bool [b or 1, 1, queries, end]: which keys the queries at these positions [b, queries] may see."""
        causal = np.arange(self.end) <= queries[:, :, None]
        if self._run.tokens.all() and (queries == queries[0]).all():
            found: Array = causal[:1, None]
        else:
            found = (causal & self._run.tokens[:, None, : self.end])[:, None]
        return found

    # Entering

    def entering(self, variant: Variant) -> dict[str, Array]:
        """The arrays [1, b, position, ...] with which one variant enters, by name."""
        return self._arrays(variant.hook, variant.start, [variant])

    def _enter(
        self,
        blocks: _Blocks,
        entering: Mapping[tuple[int, Stage], list[Variant]],
        layer: int,
        stage: Stage,
        narrow: bool = False,
    ) -> None:
        """Adds the variants that enter here to the blocks of their first positions."""
        here: dict[tuple[int, int, str], list[Variant]] = {}
        for variant in entering.get((layer, stage), ()):
            stop = self.end if variant.stop is None else min(variant.stop, self.end)
            here.setdefault((variant.start, stop, variant.hook), []).append(variant)
        for (start, stop, hook), variants in here.items():
            arrays = self._arrays(hook, start, variants)
            at, own = variants[0].entry
            if own in (Stage.MIXED, Stage.BETWEEN) and at < layer:
                arrays = {"resid": self._finished(at, start, stop, arrays)}
            if own != Stage.HEADS and stage == Stage.HEADS:
                arrays |= self._begun(layer, start, stop, arrays["resid"])
            if narrow:
                arrays = {name: self._at_read(array, start) for name, array in arrays.items()}
            blocks.setdefault(start, _Block()).join([variant.index for variant in variants], arrays)

    def _finished(self, layer: int, start: int, stop: int, arrays: Mapping[str, Array]) -> Array:
        """The residual after a block from a position on, where only those before ``stop`` change."""
        few = {name: array[:, :, : stop - start] for name, array in arrays.items()}
        shape = next(iter(few.values())).shape[:3]
        flat = {name: np.ascontiguousarray(array).reshape(-1, *array.shape[3:]) for name, array in few.items()}
        between = flat["mid"] if "mid" in flat else self._pieces.resid_mid(layer, flat["z"], flat["resid"])
        return self._replaced(f"blocks.{layer}.hook_resid_post", start, self._pieces.resid_post(layer, between), shape)

    def _begun(self, layer: int, start: int, stop: int, residual: Array) -> dict[str, Array]:
        """q, k and v of a block from a position on, where only those before ``stop`` change."""
        few = np.ascontiguousarray(residual[:, :, : stop - start])
        found = self._pieces.qkv(layer, few.reshape(-1, few.shape[-1]))
        return {
            letter: self._replaced(f"blocks.{layer}.attn.hook_{letter}", start, new, few.shape[:3])
            for letter, new in zip("qkv", found, strict=True)
        }

    def _replaced(self, name: str, start: int, new: Array, shape: tuple[int, ...]) -> Array:
        """What the corrupted run has from a position on [variant, b, ...], its first ones replaced by ``new``."""
        whole = np.repeat(self._kept(name, start), shape[0], 0)
        whole[:, :, : shape[2]] = new.reshape(*shape, *new.shape[1:])
        return whole

    def _kept(self, name: str, start: int) -> Array:
        """What the corrupted run has from a position on [1, b, positions, ...]."""
        found: Array = self._run.activations[name][None, :, start : self.end]
        return found

    def _edited(self, hook: str, start: int, variants: Sequence[Variant], axis: int = 1) -> tuple[Array, Array]:
        """(the corrupted activation from a position on [1, b, ...], the patched ones [variant, b, ...])."""
        whole = self._run.activations[hook]
        place = (slice(None),) * axis + (slice(start, self.end),)
        old, new = whole[place], np.broadcast_to(self._run.patched[hook], whole.shape)[place]
        edited = np.stack([np.where(np.broadcast_to(v.chosen, whole.shape)[place], new, old) for v in variants])
        return old[None], edited.astype(old.dtype, copy=False)

    def _arrays(self, hook: str, start: int, variants: Sequence[Variant]) -> dict[str, Array]:
        """The arrays with which variants of one hook point and first position enter."""
        layer, rest = split_name(hook)
        at, count = f"blocks.{layer or 0}.", len(variants)

        def repeated(name: str) -> Array:
            kept = self._kept(f"{at}{name}", start)
            return np.repeat(kept, count, 0)

        if rest in _ATTENTION:
            _, weights = self._edited(hook, start, variants, axis=2)
            weights = np.ascontiguousarray(weights[..., : self.end]).reshape(-1, *weights.shape[2:4], self.end)
            v = np.repeat(self._kept(f"{at}attn.hook_v", 0), count, 0)
            z = self._pieces.z_from(hook, layer or 0, weights, v.reshape(-1, *v.shape[2:]))
            return {"resid": repeated("hook_resid_pre"), "z": z.reshape(count, -1, *z.shape[1:])}
        old, edited = self._edited(hook, start, variants)
        match rest:
            case "hook_resid_pre" | "hook_resid_post":
                return {"resid": edited}
            case "hook_embed" | "hook_pos_embed":
                return {"resid": self._kept("blocks.0.hook_resid_pre", start) + (edited - old)}
            case "hook_mlp_out":
                return {"resid": self._kept(f"{at}hook_resid_post", start) + (edited - old)}
            case "mlp.hook_pre" | "mlp.hook_post":
                flat = [a.reshape(-1, a.shape[-1]) for a in (edited, repeated("hook_resid_mid"))]
                after = self._pieces.resid_post_from(hook, layer or 0, *flat)
                return {"resid": after.reshape(*edited.shape[:3], -1)}
            case "hook_resid_mid":
                return {"mid": edited}
            case "hook_attn_out":
                return {"mid": self._kept(f"{at}hook_resid_mid", start) + (edited - old)}
            case "attn.hook_result":
                return {"mid": self._kept(f"{at}hook_resid_mid", start) + (edited - old).sum(3)}
            case "attn.hook_z":
                return {"resid": repeated("hook_resid_pre"), "z": edited}
        names = {"q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v"}
        found = {letter: edited if name == rest else repeated(name) for letter, name in names.items()}
        return {"resid": repeated("hook_resid_pre"), **found}


def _rowwise(blocks: _Blocks, taken: Sequence[str], given: Sequence[str], work: Any) -> None:
    """Runs a piece that works token by token on the tokens of all blocks together: ``taken`` arrays in, ``given`` out.

    What it takes goes, but for the residual that attention is still to be added to.
    """
    if not blocks:
        return
    parts = list(blocks.values())
    counts = [int(np.prod(block.arrays[taken[0]].shape[:3])) for block in parts]
    flat = [
        np.concatenate(
            [
                block.arrays[name].reshape(n, *block.arrays[name].shape[3:])
                for block, n in zip(parts, counts, strict=True)
            ]
        )
        if len(parts) > 1
        else parts[0].arrays[name].reshape(counts[0], *parts[0].arrays[name].shape[3:])
        for name in taken
    ]
    results = work(*flat)
    offsets = np.cumsum([0, *counts])
    for block, begin, end in zip(parts, offsets[:-1], offsets[1:], strict=True):
        shape = block.arrays[taken[0]].shape[:3]
        kept = {"resid": block.arrays["resid"]} if given == ["q", "k", "v"] else {}
        new = {name: r[begin:end].reshape(*shape, *r.shape[1:]) for name, r in zip(given, results, strict=True)}
        block.arrays = {**kept, **new}
