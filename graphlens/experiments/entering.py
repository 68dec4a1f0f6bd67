"""The arrays with which patched variants enter a block: the corrupted run's, with what the patches change in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from graphlens.analysis.arrays import Array
from graphlens.engine.block_layout import MLP_OUT, NEURONS, QKV, RESID_MID, RESID_POST, RESID_PRE, ROTATED
from graphlens.engine.block_pieces import BlockPieces
from graphlens.experiments.stages import ATTENTION, RESULT, Kept, Stage, Variant, entry
from graphlens.file.names import EMBEDDINGS, in_block, split_name


class Entering:
    """Makes the arrays with which variants enter: "resid_pre", "q", "k", "v", "z" and "resid_mid" [variant, b, position, ...].

    "q" and "k" are as they are compared: rotated, where positions rotate them.

    Args:
        pieces: The model in pieces.
        kept: What is kept of the corrupted run.
        end: The position after the last one that is computed.
    """

    def __init__(self, pieces: BlockPieces, kept: Kept, end: int) -> None:
        self._pieces, self._kept, self._end = pieces, kept, end
        self._layout = pieces.layout

    def arrays(self, hook: str, start: int, variants: Sequence[Variant]) -> dict[str, Array]:
        """The arrays with which variants of one hook point and first position enter.

        Args:
            hook: The hook point.
            start: The first position.
            variants: The patched runs.
        """
        (layer, stage), rest, count = entry(hook, self._layout), split_name(hook)[1], len(variants)

        def repeated(name: str) -> Array:
            return np.repeat(self._from(in_block(layer, name), start), count, 0)

        if rest in ATTENTION:
            _, weights = self._edited(hook, start, variants, axis=2)
            weights = np.ascontiguousarray(weights[..., : self._end]).reshape(-1, *weights.shape[2:4], self._end)
            v = np.repeat(self._from(in_block(layer, QKV[2]), 0), count, 0)
            z = self._pieces.z_from(hook, layer, weights, v.reshape(-1, *v.shape[2:]))
            return {"resid_pre": repeated(RESID_PRE), "z": z.reshape(count, -1, *z.shape[1:])}
        old, edited = self._edited(hook, start, variants)
        if stage == Stage.QKV:
            return {"resid_pre": repeated(RESID_PRE), **self._heads(layer, rest, start, edited)}
        if rest == "attn.hook_z":
            return {"resid_pre": repeated(RESID_PRE), "z": edited}
        name = "resid_mid" if stage == Stage.RESID_MID else "resid_pre"
        if rest in (RESID_PRE, RESID_MID, RESID_POST):
            return {name: edited}
        if rest in NEURONS:
            added = self._from_neurons(hook, start, edited) - self._from(in_block(layer, MLP_OUT), start)
        else:
            added = (edited - old).sum(3) if rest == RESULT else edited - old
        total = {"resid_mid": RESID_MID, "resid_pre": RESID_PRE if rest in EMBEDDINGS else RESID_POST}[name]
        return {name: self._from(in_block(layer, total), start) + added}

    def finished(self, layer: int, start: int, stop: int, arrays: Mapping[str, Array]) -> Array:
        """A block's resid_post from a position on, where only positions before ``stop`` change.

        Args:
            layer: The block.
            start: The first position.
            stop: The position after the last one that changes.
            arrays: "resid_mid", or "z" and "resid_pre".
        """
        few = {name: array[:, :, : stop - start] for name, array in arrays.items()}
        shape = next(iter(few.values())).shape[:3]
        rows = {name: np.ascontiguousarray(array).reshape(-1, *array.shape[3:]) for name, array in few.items()}
        if "resid_mid" in rows:
            after = self._pieces.resid_post(layer, rows["resid_mid"])
        else:
            after = self._pieces.resid_post_of(layer, rows["z"], rows["resid_pre"])
        return self._replaced(in_block(layer, RESID_POST), start, after, shape)

    def begun(self, layer: int, start: int, stop: int, residual: Array) -> dict[str, Array]:
        """ "q", "k" and "v" of a block from a position on, where only positions before ``stop`` change.

        Args:
            layer: The block.
            start: The first position.
            stop: The position after the last one that changes.
            residual: Its resid_pre from the first position on.
        """
        few = np.ascontiguousarray(residual[:, :, : stop - start])
        positions = self.positions(start, few.shape[:3]) if self._layout.rotates(layer) else None
        found = self._pieces.compared(layer, few.reshape(-1, few.shape[-1]), positions)
        return {
            letter: self._replaced(name, start, new, few.shape[:3])
            for letter, name, new in zip("qkv", self._layout.compared(layer), found, strict=True)
        }

    def positions(self, start: int, shape: tuple[int, ...]) -> Array:
        """The positions of rows of variants, int64 [variant * b * positions].

        Args:
            start: The first position.
            shape: (variants, b, positions).
        """
        return np.broadcast_to(self._kept.positions[:, start : start + shape[2]], shape).reshape(-1)

    def _heads(self, layer: int, rest: str, start: int, edited: Array) -> dict[str, Array]:
        """ "q", "k" and "v" of a block, one of them edited, maybe before it is rotated."""
        compared = self._layout.compared(layer)
        if rest in ROTATED and self._layout.rotates(layer):
            rows = edited.reshape(-1, *edited.shape[3:])
            turned = self._pieces.rotated(layer, rest, rows, self.positions(start, edited.shape[:3]))
            edited, rest = turned.reshape(edited.shape), ROTATED[rest]
        return {
            letter: edited if name == in_block(layer, rest) else np.repeat(self._from(name, start), len(edited), 0)
            for letter, name in zip("qkv", compared, strict=True)
        }

    def _from_neurons(self, hook: str, start: int, edited: Array) -> Array:
        """hook_mlp_out where an MLP's neurons are edited."""
        layer, rest = split_name(hook)
        assert layer is not None
        rows = {}
        for name in self._layout.neurons(layer, rest):
            array = edited if name == hook else np.repeat(self._from(name, start), len(edited), 0)
            rows[name] = array.reshape(-1, array.shape[-1])
        return self._pieces.mlp_out_from(layer, rows).reshape(*edited.shape[:3], -1)

    def _replaced(self, name: str, start: int, new: Array, shape: tuple[int, ...]) -> Array:
        """The corrupted activation from a position on [1 or variant, b, ...], its first positions replaced by ``new``."""
        whole = np.repeat(self._from(name, start), shape[0], 0)
        whole[:, :, : shape[2]] = new.reshape(*shape, *new.shape[1:])
        return whole

    def _from(self, name: str, start: int) -> Array:
        """The corrupted activation from a position on [1, b, positions, ...]."""
        found: Array = self._kept.activations[name][None, :, start : self._end]
        return found

    def _edited(self, hook: str, start: int, variants: Sequence[Variant], axis: int = 1) -> tuple[Array, Array]:
        """(the corrupted activation from a position on [1, b, ...], the patched ones [variant, b, ...])."""
        whole = self._kept.activations[hook]
        place = (slice(None),) * axis + (slice(start, self._end),)
        old = whole[place]
        edited = np.stack(
            [np.where(np.broadcast_to(v.chosen, whole.shape)[place], self._new(v, whole)[place], old) for v in variants]
        )
        return old[None], edited.astype(old.dtype, copy=False)

    def _new(self, variant: Variant, whole: Array) -> Array:
        """What a variant puts in an activation's place."""
        return np.broadcast_to(
            self._kept.patched[variant.hook] if variant.made is None else variant.made(), whole.shape
        )
