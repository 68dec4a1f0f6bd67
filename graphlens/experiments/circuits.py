"""Edges of the residual graph: their first-order scores, and runs in which only a circuit carries the clean prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from graphlens.analysis.arrays import Array
from graphlens.analysis.edges import EMBED, LETTERS, Edge, Node, edges, receivers, senders
from graphlens.analysis.result import SweepResult
from graphlens.analysis.sources import Cache
from graphlens.edits.kinds import Steer
from graphlens.engine.block_layout import MLP_OUT, QKV, RESID_POST, RESID_PRE, ROTATED, BlockLayout, Z
from graphlens.engine.block_pieces import BlockPieces
from graphlens.errors import InputError
from graphlens.experiments.attribution import checked_steps, refuse_backward_hooks
from graphlens.experiments.circuit_run import CircuitRun
from graphlens.experiments.corrupted_run import CorruptedRun
from graphlens.experiments.heads_written import HeadsWritten
from graphlens.experiments.proof import SUMS, why_not_apart
from graphlens.experiments.recompute import MAX_BATCH_TOKENS, Recomputation
from graphlens.experiments.stages import Kept
from graphlens.experiments.sweep import check_processing
from graphlens.experiments.sweep_metrics import Measure
from graphlens.file.io_names import LOGITS, gradient_output
from graphlens.file.names import in_block

if TYPE_CHECKING:
    from graphlens.model.hooked_transformer import HookedTransformer
    from graphlens.model.runner import Runner

_FLAGS = ("use_hook_mlp_in", "use_split_qkv_input")
_ENTRY = in_block(0, RESID_PRE)
_READ = ("hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in")


def edge_attribution(
    model: HookedTransformer[Any],
    corrupted_tokens: Any,
    clean_cache: Mapping[str, Any],
    metric: Measure,
    *,
    steps: int = 0,
    **forward_options: Any,
) -> SweepResult:
    """Scores every edge of the residual graph by a first-order estimate (edge attribution patching).

    A score is the difference between what the edge's sender writes in the clean run and in the corrupted run, times the
    gradient with respect to what its receiver reads, before LayerNorm (Syed et al. 2023). It estimates what patching that
    edge alone adds to the metric; a sender's scores sum to its attribution patching score. Senders are heads, MLPs, and
    the embeddings together; receivers are q, k and v of each head, MLPs and the logits. Where attention's output is
    normalised before it is added to the residual stream (Gemma 2 and 3), a head writes its output divided by that norm's
    scale in the run, times the norm's weight.

    Args:
        model: The model.
        corrupted_tokens: Tokens [b, p] or text; a list of texts is padded on the left.
        clean_cache: The clean run's blocks.0.hook_resid_pre, hook_z and hook_mlp_out, and the hook_scale of norms after
            attention.
        metric: What is measured; it needs a derivative.
        steps: Gradients averaged between the corrupted embeddings and the clean ones, at midpoints (EAP-IG: Hanna et
            al. 2024); 0 takes the gradient at the corrupted run.
        **forward_options: Those of ``forward``.

    Returns:
        An axis "edge", labelled "L0H1->L2H3.q", "embed->L0MLP", "L1MLP->logits".

    Raises:
        UnknownHookPoint: Where the cache lacks a hook point.
        InputError: For what does not fit the model, the prompts or each other.
    """
    checked_steps(steps)
    check_processing(model.cfg, clean_cache)
    if isinstance(metric, (list, tuple, dict)):
        raise InputError("edges are scored by one metric, not by several.")
    graph = ResidualGraph.of(model.runner, corrupted_tokens, clean_cache, metric, **forward_options)
    values = graph.scores(steps)
    labels = {"edge": [str(edge) for edge in graph.edges]}
    bound = graph.metric
    metadata: dict[str, Any] = {"model": model.cfg.model_name, "metrics": [getattr(bound, "name", "metric")]}
    if graph.straight_through:
        metadata["straight_through"] = graph.straight_through
    return SweepResult(values, ("edge",), labels, {"corrupted": 0.0}, metadata)


def faithfulness(
    model: HookedTransformer[Any],
    corrupted_tokens: Any,
    clean_cache: Mapping[str, Any],
    metric: Measure,
    circuits: Mapping[Any, Iterable[str]],
    **forward_options: Any,
) -> SweepResult:
    """The metric with every edge outside a circuit patched to the corrupted run, for several circuits.

    In each run the edges of the circuit carry what their senders write in that run, beginning with the clean embeddings;
    all others carry what the corrupted run wrote. All edges give the clean run, none the corrupted one;
    ``metric.normalised()`` makes of it the usual faithfulness.

    Args:
        model: The model.
        corrupted_tokens: See ``edge_attribution``, as for ``clean_cache``.
        clean_cache: See there.
        metric: What is measured.
        circuits: Names (say, numbers of edges) and edges by label.
        **forward_options: Those of ``forward``.

    Returns:
        An axis "circuit".

    Raises:
        UnknownHookPoint: Where the cache lacks a hook point.
        InputError: For an edge that is none, and for what does not fit the model, the prompts or each other.
    """
    check_processing(model.cfg, clean_cache)
    graph = ResidualGraph.of(model.runner, corrupted_tokens, clean_cache, metric, **forward_options)
    known = {str(edge): edge for edge in graph.edges}
    if not isinstance(circuits, Mapping) or not circuits:
        raise InputError("circuits maps names to edges: {'mine': ['embed->logits']}, say; there is none to measure.")
    if getattr(metric, "reduction", "mean") != "mean":
        raise InputError(f"{metric!r} is a number for each prompt; faithfulness is of one: reduction='mean'.")
    values = []
    for name, kept in circuits.items():
        if isinstance(kept, str):
            raise InputError(f"circuit {name!r} is the text {kept!r}: give a list of edges.")
        labels = list(dict.fromkeys(kept))
        unknown = [label for label in labels if label not in known]
        if unknown:
            raise InputError(
                f"circuit {name!r}: {unknown[0]!r} is no edge of this model. They look like 'L0H1->L2H3.q', "
                "'embed->L0MLP', 'L1MLP->logits'."
            )
        logits = graph.circuit_logits([known[label] for label in labels])
        values.append(graph.run.measuring.of(graph.metric, logits))
    baselines = {"corrupted": graph.run.measuring.corrupted[0], "clean": graph.run.measuring.clean[0]}
    names = {"circuit": [str(name) for name in circuits]}
    return SweepResult(np.stack(values), ("circuit",), names, baselines, {"model": model.cfg.model_name})


@dataclass(frozen=True)
class ResidualGraph:
    """The corrupted run and the clean one, edge by edge.

    Attributes:
        run: The corrupted run, with the metric.
        clean: What senders wrote in the clean run, by hook name.
        edges: Every edge there is.
        heads: What heads write.
        layout: How the model's blocks are laid out.
        straight_through: What its gradients passed as if it did not round.
    """

    run: CorruptedRun
    clean: Mapping[str, Array]
    edges: list[Edge]
    heads: HeadsWritten
    layout: BlockLayout
    straight_through: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, runner: Runner[Any], corrupted: Any, cache: Mapping[str, Any], metric: Measure, **forward_options: Any
    ) -> Self:
        """Runs the corrupted prompts and reads the clean cache at every sender.

        Args:
            runner: Runs the model.
            corrupted: The corrupted prompts.
            cache: The clean run's cache.
            metric: What is measured.
            **forward_options: Those of ``forward``.

        Raises:
            UnknownHookPoint: Where the cache lacks a hook point.
            InputError: For runs that are not the plain model's, and for a model whose residual stream is not the sum of
                what its components write.
        """
        request = runner.whole_prompts(corrupted, **forward_options)
        refuse_backward_hooks(runner)
        if runner.config.normalises_residual:
            raise InputError(
                f"{runner.config.model_name} normalises its residual stream after each sublayer, so the stream is not the sum of "
                "what its components write, and they have no edges."
            )
        if not runner.active().of_file:
            raise InputError(
                "edges are of the plain model: leave the hooks(), intervene() or saes() block first, or call reset_saes()."
            )
        config, source = runner.config, Cache(cache)
        layers, layout = range(config.n_layers), BlockLayout.of(runner.engine)
        heads = HeadsWritten(runner.weights, config, layout)
        written = [_ENTRY]
        keep = [in_block(layer, layout.read_by_mlp) for layer in layers]
        for layer in layers:
            written += [in_block(layer, name) for name in (Z, MLP_OUT, *heads.scales)]
            keep += [in_block(layer, name) for name in (*QKV, RESID_PRE, RESID_POST)]
        keep = list(dict.fromkeys([*keep, *written]))
        lacking = set(keep) - set(runner.engine.hook_names)
        if lacking:
            raise InputError(f"edges are computed from {sorted(lacking)[0]!r}, and this model has no such hook point.")
        run = CorruptedRun.of(runner, request, (), source, [metric], keep)
        _prove_sum(run, heads)
        clean = {name: source.value(name, run.activations[name], request.mask) for name in written}
        readers = receivers(config.n_layers, config.n_heads, config.n_key_value_heads)
        every = edges(senders(config.n_layers, config.n_heads), readers, layout.parallel)
        return cls(run, clean, every, heads, layout)

    @property
    def metric(self) -> Measure:
        """The metric, with token ids in place of text."""
        return self.run.measuring.metrics[0]

    def _written(self) -> dict[Node, Array]:
        """What each sender writes in the clean run minus what it writes in the corrupted one, [b, p, d_model]."""
        run = self.run
        found = {Node(EMBED): self.clean[_ENTRY] - run.activations[_ENTRY]}
        for layer in range(run.n_layers):
            found |= self.heads.changed(layer, self.clean, run.activations)
            name = in_block(layer, MLP_OUT)
            found[Node("mlp", layer)] = self.clean[name] - run.activations[name]
        return found

    def scores(self, steps: int) -> Array:
        """The first-order score of each edge; see ``edge_attribution``.

        Args:
            steps: How many gradients are averaged; 0 takes the one at the corrupted run.

        Returns:
            float64 [edge], in the order of ``edges``.
        """
        run, written = self.run, self._written()
        last = in_block(run.n_layers - 1, RESID_POST)
        hooks = [*(in_block(layer, name) for layer in range(run.n_layers) for name in _READ), last]
        total: dict[str, Array] = {}
        for step in range(max(1, steps)):
            share = (step + 0.5) / steps if steps else 0.0
            found = self._gradients(hooks, share * written[Node(EMBED)])
            total = {name: total[name] + g if total else g for name, g in found.items()}
        total = {name: g / max(1, steps) for name, g in total.items()}
        scores = np.empty(len(self.edges))
        for index, edge in enumerate(self.edges):
            scores[index] = np.vdot(written[edge.sender], _read_by(edge.receiver, total, last))
        return scores

    def _gradients(self, hooks: Sequence[str], shift: Array) -> dict[str, Array]:
        """The gradients with respect to hook points where ``shift`` [b, p, d_model] is added to the embeddings."""
        run = self.run
        request = replace(run.request, plan=replace(run.request.plan, flags=_FLAGS))
        with run.runner.editing(Steer(_ENTRY, shift) if shift.any() else ()):
            ran = run.runner.run_backward(request, run.runner.seed(request, self.metric), hooks)
        self.straight_through.update(ran.straight_through)
        return {name: ran.values[gradient_output(name)].astype(np.float64) for name in hooks}

    def circuit_logits(self, kept: Sequence[Edge]) -> Array:
        """The logits of a run in which a circuit carries the clean prompt; see ``faithfulness``.

        Args:
            kept: The edges of the circuit. All others carry what the corrupted run wrote.

        Returns:
            [b, p, V].

        Raises:
            InputError: The prompts are so long that their keys are rotated by other frequencies (longrope).
        """
        run, base = self.run, self.run.activations
        if run.runner.engine.manifest.adopted is not None:
            return CircuitRun(run, self.heads, self.layout, self._written()[Node(EMBED)], kept).logits()
        why = why_not_apart(run)
        if why:
            raise InputError(f"a circuit is run token by token, and {why}.")
        pieces = BlockPieces(run.runner.engine, MAX_BATCH_TOKENS)
        kept_run = Kept(base, run.tokens, {})
        window = run.runner.config.window_size
        whole = Recomputation(pieces, kept_run, None, MAX_BATCH_TOKENS, window)
        positions = kept_run.positions.reshape(-1)
        into: dict[Node, list[Node]] = {}
        for edge in kept:
            into.setdefault(edge.receiver, []).append(edge.sender)
        changed: dict[Node, Array] = {Node(EMBED): self._written()[Node(EMBED)]}

        def read(receiver: Node, corrupted: Array) -> Array | None:
            """What a receiver reads; None where it is the corrupted run's."""
            arriving = [changed[sender] for sender in into.get(receiver, ()) if sender in changed]
            return corrupted + sum(arriving) if arriving else None

        for layer in range(run.n_layers):
            before = base[in_block(layer, RESID_PRE)]
            heads = [base[in_block(layer, name)].copy() for name in QKV]
            touched = False
            for which, letter in enumerate(LETTERS):
                for head in range(heads[which].shape[2]):
                    residual = read(Node("head", layer, head, letter), before)
                    if residual is not None:
                        new = pieces.qkv(layer, residual.reshape(-1, residual.shape[-1]))[which]
                        heads[which][:, :, head] = new.reshape(*residual.shape[:2], *new.shape[1:])[:, :, head]
                        touched = True
            if touched:
                # After the mixture: a norm of queries or keys may be over all heads.
                q, k, v = (
                    pieces.rotated(layer, name, each.reshape(-1, *each.shape[2:]), positions).reshape(each.shape)
                    if name in ROTATED and self.layout.rotates(layer)
                    else each
                    for name, each in zip(QKV, heads, strict=True)
                )
                z = pieces.z(layer, q, k, v, whole.seen(layer))
                changed |= self.heads.changed(layer, self.heads.found(pieces, layer, z), base)
            residual = read(Node("mlp", layer), base[in_block(layer, self.layout.read_by_mlp)])
            if residual is not None:
                new = pieces.mlp_out(layer, residual.reshape(-1, residual.shape[-1])).reshape(residual.shape)
                changed[Node("mlp", layer)] = new - base[in_block(layer, MLP_OUT)]
        last = base[in_block(run.n_layers - 1, RESID_POST)]
        residual = read(Node("logits"), last)
        residual = last if residual is None else residual
        return pieces.end(residual.reshape(-1, residual.shape[-1]), LOGITS).reshape(*residual.shape[:2], -1)


def _prove_sum(run: CorruptedRun, heads: HeadsWritten) -> None:
    """Raises InputError unless the residual is the sum of what senders and biases write: edges are of such a model."""
    config, base = run.runner.config, run.activations
    total = base[_ENTRY].astype(np.float64)
    for layer in range(run.n_layers):
        written = heads.of(layer, base)
        total += sum(written.values()) + heads.bias(layer) + base[in_block(layer, MLP_OUT)]
    end = base[in_block(run.n_layers - 1, RESID_POST)]
    apart = float(np.abs(total - end).max())
    if apart > SUMS.get(config.dtype, SUMS["float32"]) * float(np.abs(end).max()):
        raise InputError(
            f"this model's residual stream is not the sum of its components ({apart:.1e} off): it holds edits, or multiplies "
            "what is added, so its edges are not what its weights say."
        )


def _read_by(receiver: Node, gradients: Mapping[str, Array], last: str) -> Array:
    """The gradient with respect to what a receiver reads [b, p, d_model]."""
    if receiver.kind == "logits":
        return gradients[last]
    if receiver.kind == "mlp":
        return gradients[in_block(receiver.layer, "hook_mlp_in")]
    found: Array = gradients[in_block(receiver.layer, f"hook_{receiver.letter}_input")][:, :, receiver.head]
    return found
