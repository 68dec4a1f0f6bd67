"""Path patching by whole runs, for models whose blocks are not cut: every sublayer but the sender's writes what it wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from graphlens.analysis.arrays import Array
from graphlens.analysis.sites import Site
from graphlens.edits.kinds import Patch
from graphlens.engine.block_layout import ATTN_OUT, MLP_OUT
from graphlens.experiments.corrupted_run import CorruptedRun
from graphlens.experiments.sweep_run import Done
from graphlens.file.names import in_block, split_name

_OF_ATTENTION = frozenset({"attn.hook_z", "attn.hook_result", ATTN_OUT})
_OF_MLPS = frozenset({"mlp.hook_post", MLP_OUT})


class FrozenRuns:
    """The runs of path patching: one with the sender patched and everything else frozen, one with the receivers patched.

    Args:
        run: The corrupted run; it keeps what ``needed`` names.
        frozen_mlps: Whether MLPs too write what they wrote; else they are computed again from the changed residual.
    """

    def __init__(self, run: CorruptedRun, frozen_mlps: bool) -> None:
        self._run = run
        names = (ATTN_OUT, MLP_OUT) if frozen_mlps else (ATTN_OUT,)
        there = (in_block(layer, name) for layer in range(run.n_layers) for name in names)
        self._frozen = {name: Patch(name, run.activations[name]) for name in there if name in run.activations}

    @staticmethod
    def needed(n_layers: int, attn_only: bool) -> list[str]:
        """The activations of the corrupted run that are read, besides the senders' and receivers' own.

        Args:
            n_layers: How many blocks there are.
            attn_only: True where they have no MLP.
        """
        names = (ATTN_OUT,) if attn_only else (ATTN_OUT, MLP_OUT)
        return [in_block(layer, name) for layer in range(n_layers) for name in names]

    def to_logits(self) -> Iterator[Done]:
        """Each sender along its direct path to the logits: (its index, the metrics)."""
        for index in range(len(self._run.sites)):
            if self._run.variant(index) is None:
                yield self._unchanged(index)
                continue
            with self._run.runner.editing(self._patches(index)):
                logits = self._run.runner.run(self._run.request).logits
            yield self._measured(index, logits)

    def to_heads(self, receivers: Sequence[Site]) -> Iterator[Done]:
        """Each sender along its direct paths to the receivers, which are patched in a run of the model.

        Args:
            receivers: Sites of queries, keys and values.
        """
        run = self._run
        hooks = list(dict.fromkeys(receiver.hook for receiver in receivers))
        for index in range(len(run.sites)):
            later = [receiver for receiver in receivers if self._reaches(index, receiver)]
            if run.variant(index) is None or not later:
                yield self._unchanged(index)
                continue
            with run.runner.editing(self._patches(index)):
                found: Mapping[str, Array] = run.runner.run(run.request, hooks, output=False).values
            with run.runner.editing([run.patch(receiver, found[receiver.hook]) for receiver in later]):
                logits = run.runner.run(run.request).logits
            yield self._measured(index, logits)

    def _reaches(self, index: int, receiver: Site) -> bool:
        """True if a receiver reads what a sender writes: it comes after it."""
        layer, rest = split_name(self._run.sites[index].hook)
        inside = rest in _OF_ATTENTION | _OF_MLPS
        return not inside or (receiver.layer or 0) > (layer or 0)

    def _patches(self, index: int) -> list[Patch]:
        """The sender's patch, and what holds everything else but the MLPs that are computed again."""
        site = self._run.sites[index]
        layer, rest = split_name(site.hook)
        own = ATTN_OUT if rest in _OF_ATTENTION else MLP_OUT if rest in _OF_MLPS else ""
        spared = in_block(layer or 0, own) if own else ""
        held = [patch for name, patch in self._frozen.items() if name != spared]
        return [self._run.patch(site, self._run.patched[site.hook]), *held]

    def _unchanged(self, index: int) -> Done:
        return [index], [base[None] for base in self._run.measuring.corrupted]

    def _measured(self, index: int, logits: Array) -> Done:
        measuring = self._run.measuring
        return [index], [measuring.of(metric, logits)[None] for metric in measuring.metrics]
