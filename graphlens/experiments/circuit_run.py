"""The run in which a circuit carries the clean prompt, as one run of the whole model: for models whose blocks are not cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from graphlens.analysis.arrays import Array
from graphlens.analysis.edges import EMBED, LETTERS, Edge, Node
from graphlens.engine.block_layout import ATTN_OUT, MLP_OUT, RESID_POST, RESID_PRE, BlockLayout, Z
from graphlens.experiments.corrupted_run import CorruptedRun
from graphlens.experiments.heads_written import HeadsWritten
from graphlens.file.names import in_block

_FLAGS = ("use_hook_mlp_in", "use_split_qkv_input")


class CircuitRun:
    """What each receiver reads is put in its place, as the run passes: the corrupted run's, and what arrives by its edges.

    Args:
        run: The corrupted run, with what senders write and receivers read.
        heads: What heads write.
        layout: How the model's blocks are laid out.
        embedded: What the clean embeddings are more than the corrupted ones, [b, p, d_model].
        kept: The edges of the circuit.
    """

    def __init__(
        self, run: CorruptedRun, heads: HeadsWritten, layout: BlockLayout, embedded: Array, kept: Sequence[Edge]
    ) -> None:
        self._run, self._heads, self._layout = run, heads, layout
        self._changed: dict[Node, Array] = {Node(EMBED): embedded}
        self._into: dict[Node, list[Node]] = {}
        for edge in kept:
            self._into.setdefault(edge.receiver, []).append(edge.sender)
        self._seen: dict[str, Array] = {}

    def logits(self) -> Array:
        """The logits of the run, [b, p, V]."""
        run = self._run
        calls: dict[str, Callable[[Array], Array]] = {}
        for layer in range(run.n_layers):
            calls |= self._block(layer)
        last = in_block(run.n_layers - 1, RESID_POST)
        calls[last] = lambda value: self._read(Node("logits"), run.activations[last])
        request = replace(run.request, plan=replace(run.request.plan, flags=_FLAGS))
        found = run.runner.engine.run(request.feeds, [], calls, plan=request.plan).output
        assert found is not None, "logits were asked for"
        return found

    def _block(self, layer: int) -> dict[str, Callable[[Array], Array]]:
        """What the hook points of a block call."""
        base = self._run.activations
        before, read = base[in_block(layer, RESID_PRE)], base[in_block(layer, self._layout.read_by_mlp)]

        def entering(letter: str) -> Callable[[Array], Array]:
            def call(value: Array) -> Array:  # [b, p, head, d_model]
                each = [self._read(Node("head", layer, head, letter), before) for head in range(value.shape[2])]
                return np.stack(each, 2).astype(value.dtype, copy=False)

            return call

        def keep(name: str) -> Callable[[Array], Array]:
            def call(value: Array) -> Array:
                self._seen[name] = value.copy()
                return value

            return call

        def attended(value: Array) -> Array:
            self._changed |= self._heads.changed(layer, self._seen, base)
            return value

        def written(value: Array) -> Array:
            self._changed[Node("mlp", layer)] = value - base[in_block(layer, MLP_OUT)]
            return value

        kept: Mapping[str, Callable[[Array], Array]] = {
            name: keep(name) for name in (in_block(layer, each) for each in (Z, *self._heads.scales))
        }
        return {
            **{in_block(layer, f"hook_{letter}_input"): entering(letter) for letter in LETTERS},
            **kept,
            in_block(layer, ATTN_OUT): attended,
            in_block(layer, "hook_mlp_in"): lambda value: self._read(Node("mlp", layer), read),
            in_block(layer, MLP_OUT): written,
        }

    def _read(self, receiver: Node, corrupted: Array) -> Array:
        """What a receiver reads."""
        arriving = [self._changed[sender] for sender in self._into.get(receiver, ()) if sender in self._changed]
        total = corrupted if not arriving else corrupted + sum(arriving)
        return np.asarray(total, corrupted.dtype)
