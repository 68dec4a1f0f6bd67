"""Edges of the residual graph in a run: their first-order scores, and runs in which only some carry the clean prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens.analysis.edges import EMBED, LETTERS, Edge, Node, edges, receivers, senders
from graphlens.analysis.result import SweepResult
from graphlens.analysis.sources import Cache
from graphlens.engine.block_pieces import BlockPieces
from graphlens.errors import InputError
from graphlens.experiments.attribution import AttributionMethods
from graphlens.experiments.recompute import Corrupted, Recomputation
from graphlens.experiments.sweep import MAX_BATCH_TOKENS, check_processing
from graphlens.experiments.sweep_run import Sweeper
from graphlens.file.io_names import gradient_output

Array = npt.NDArray[Any]
_FLAGS = ("use_hook_mlp_in", "use_split_qkv_input")


@dataclass
class EdgeRun:
    """Both runs, for scores and circuits: the corrupted activations and the clean ones by hook name."""

    edges: list[Edge]
    base: Mapping[str, Array]
    clean: Mapping[str, Array]
    sweeper: Sweeper


class EdgeMethods(AttributionMethods):
    """The part of HookedTransformer that works on edges, for graphlens.attribution."""

    def _edge_run(self, corrupted: Any, cache: Mapping[str, Any], metric: Any, **options: Any) -> EdgeRun:
        """Runs the corrupted prompt and reads the clean cache at every sender. Raises InputError, UnknownHookPoint."""
        request = self._whole_prompts(corrupted, options)
        self._refuse_backward_hooks()
        if not self._stands_alone():
            raise InputError("edges are of the plain model: leave the hooks() or intervene() block first.")
        config = self._engine.manifest.config
        layers = config.n_layers
        names = [f"blocks.{layer}.{n}" for layer in range(layers) for n in _KEPT]
        sweeper = Sweeper(self, request, (), Cache(cache), [metric], MAX_BATCH_TOKENS, True, names)
        self._prove_sum(sweeper._base)
        source = Cache(cache)
        written = ["blocks.0.hook_resid_pre"]
        written += [f"blocks.{layer}.{name}" for layer in range(layers) for name in ("attn.hook_z", "hook_mlp_out")]
        clean = {name: source.value(name, sweeper._base[name], request.mask) for name in written}
        readers = receivers(layers, config.n_heads, config.n_key_value_heads or config.n_heads)
        return EdgeRun(edges(senders(layers, config.n_heads), readers), sweeper._base, clean, sweeper)

    def _prove_sum(self, base: Mapping[str, Array]) -> None:
        """Raises InputError unless the residual is the sum of what senders and biases write: edges are of such a model."""
        config = self._engine.manifest.config
        total = base["blocks.0.hook_resid_pre"].astype(np.float64)
        for layer in range(config.n_layers):
            heads = self._heads_written(layer, base[f"blocks.{layer}.attn.hook_z"])
            bias = self._weight(f"blocks.{layer}.attn.b_O")  # type: ignore[attr-defined]
            total += sum(heads.values()) + bias + base[f"blocks.{layer}.hook_mlp_out"]
        end = base[f"blocks.{config.n_layers - 1}.hook_resid_post"]
        apart = float(np.abs(total - end).max())
        limit = _SUMS[config.dtype] if config.dtype in _SUMS else _SUMS["float32"]
        if apart > limit * float(np.abs(end).max()):
            raise InputError(
                f"this model's residual stream is not the sum of its components ({apart:.1e} off): it holds edits, so its edges "
                "are not what its weights say. Attribute the model without them."
            )

    def _written(self, run: EdgeRun) -> dict[Node, Array]:
        """What each sender writes in the clean run less what in the corrupted one [b, pos, d_model]."""
        config = self._engine.manifest.config
        found = {Node(EMBED): run.clean["blocks.0.hook_resid_pre"] - run.base["blocks.0.hook_resid_pre"]}
        for layer in range(config.n_layers):
            name = f"blocks.{layer}.attn.hook_z"
            found |= self._heads_written(layer, run.clean[name] - run.base[name])
            name = f"blocks.{layer}.hook_mlp_out"
            found[Node("mlp", layer)] = run.clean[name] - run.base[name]
        return found

    def _heads_written(self, layer: int, z: Array) -> dict[Node, Array]:
        """What heads write for z [b, pos, head, d_head]."""
        w_o = self._weight(f"blocks.{layer}.attn.W_O").astype(z.dtype)  # type: ignore[attr-defined]
        return {Node("head", layer, head): z[:, :, head] @ w_o[head] for head in range(z.shape[2])}

    def _edge_scores(self, run: EdgeRun, metric: Any, steps: int) -> Array:
        """(clean - corrupted) written . gradient read, for each edge; ``steps``: of the mean of gradients at midpoints
        between the corrupted embeddings and the clean ones (EAP-IG)."""
        written = self._written(run)
        request = run.sweeper._request
        request = replace(request, plan=replace(request.plan, flags=_FLAGS))
        config = self._engine.manifest.config
        hooks = [f"blocks.{layer}.{n}" for layer in range(config.n_layers) for n in (*_READ, "hook_mlp_in")]
        last = f"blocks.{config.n_layers - 1}.hook_resid_post"
        total: dict[str, Array] = {}
        for step in range(max(1, steps)):
            share = (step + 0.5) / steps if steps else 0.0
            found = self._gradients_at(request, [*hooks, last], metric, share * written[Node(EMBED)])
            total = {name: total[name] + g if total else g for name, g in found.items()}
        total = {name: g / max(1, steps) for name, g in total.items()}
        scores = np.empty(len(run.edges))
        for index, edge in enumerate(run.edges):
            scores[index] = np.vdot(written[edge.sender], _read_by(edge.receiver, total, last))
        return scores

    def _gradients_at(self, request: Any, hooks: Sequence[str], metric: Any, shift: Array) -> dict[str, Array]:
        from graphlens.edits.kinds import Steer

        with self.intervene(Steer("blocks.0.hook_resid_pre", shift) if shift.any() else ()):
            seed = self._seed(request, metric)
            _, found = self._execute_gradients(request, (), hooks, seed, output=False)
        return {name: found[gradient_output(name)].astype(np.float64) for name in hooks}

    def _circuit_logits(self, run: EdgeRun, kept: Sequence[Edge]) -> Array:
        """Logits of a run in which the edges kept carry what their senders write, from the clean embeddings on, and all
        others what the corrupted run wrote."""
        config = self._engine.manifest.config
        pieces = BlockPieces(self._engine, MAX_BATCH_TOKENS)
        shapes = Corrupted(run.base, run.sweeper._mask, {})
        mask = Recomputation(pieces, shapes, config.n_layers, None, MAX_BATCH_TOKENS).mask()
        into: dict[Node, list[Node]] = {}
        for edge in kept:
            into.setdefault(edge.receiver, []).append(edge.sender)
        changed: dict[Node, Array] = {Node(EMBED): self._written(run)[Node(EMBED)]}

        def read(receiver: Node, base: Array) -> Array | None:
            """What a receiver reads; None where it is the corrupted run's."""
            arriving = [changed[sender] for sender in into.get(receiver, ()) if sender in changed]
            return base + sum(arriving) if arriving else None

        for layer in range(config.n_layers):
            at = f"blocks.{layer}."
            heads = [run.base[f"{at}attn.hook_{letter}"].copy() for letter in LETTERS]
            touched = False
            for which, letter in enumerate(LETTERS):
                for head in range(heads[which].shape[2]):
                    residual = read(Node("head", layer, head, letter), run.base[f"{at}hook_resid_pre"])
                    if residual is not None:
                        flat = residual.reshape(-1, residual.shape[-1])
                        new = pieces.qkv(layer, flat)[which]
                        heads[which][:, :, head] = new.reshape(*residual.shape[:2], *new.shape[1:])[:, :, head]
                        touched = True
            if touched:
                q, k, v = heads
                z = pieces.z(layer, q, k, v, mask)
                changed |= self._heads_written(layer, z - run.base[f"{at}attn.hook_z"])
            between = read(Node("mlp", layer), run.base[f"{at}hook_resid_mid"])
            if between is not None:
                after = pieces.resid_post(layer, between.reshape(-1, between.shape[-1])).reshape(between.shape)
                changed[Node("mlp", layer)] = (after - between) - run.base[f"{at}hook_mlp_out"]
        last = run.base[f"blocks.{config.n_layers - 1}.hook_resid_post"]
        residual = read(Node("logits"), last)
        residual = last if residual is None else residual
        return pieces.end(residual.reshape(-1, residual.shape[-1]), "logits").reshape(*residual.shape[:2], -1)


_SUMS = {"float16": 2e-2, "float32": 1e-3, "float64": 1e-6}  # of the largest residual
_READ = ("hook_q_input", "hook_k_input", "hook_v_input")
_KEPT = (
    "hook_resid_pre", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "hook_resid_mid", "hook_mlp_out",
    "hook_resid_post",
)  # fmt: skip


def _read_by(receiver: Node, gradients: Mapping[str, Array], last: str) -> Array:
    """The gradient with respect to what a receiver reads [b, pos, d_model]."""
    if receiver.kind == "logits":
        return gradients[last]
    if receiver.kind == "mlp":
        return gradients[f"blocks.{receiver.layer}.hook_mlp_in"]
    found: Array = gradients[f"blocks.{receiver.layer}.hook_{receiver.letter}_input"][:, :, receiver.head]
    return found


def edge_attribution(
    model: Any,
    corrupted_tokens: Any,
    clean_cache: Mapping[str, Any],
    metric: Any,
    *,
    steps: int = 0,
    **forward_options: Any,
) -> SweepResult:
    """Scores every edge of the residual graph: what its sender writes in the clean run less what in the corrupted one,
    times the gradient with respect to what its receiver reads, before LayerNorm (edge attribution patching: Syed et al.
    2023). An axis "edge", labelled "L0H1->L2H3.q", "embed->L0MLP", "L1MLP->logits".

    Senders are the embeddings together, heads and MLPs; receivers q, k and v of each head, MLPs and the logits. A score
    estimates what patching that edge alone adds to the metric; a sender's scores sum to its attribution patching score.
    ``steps``: gradients averaged between the corrupted embeddings and the clean ones (EAP-IG: Hanna et al. 2024).
    ``clean_cache`` needs blocks.0.hook_resid_pre, hook_z and hook_mlp_out. Raises UnknownHookPoint and InputError.
    """
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 0:
        raise InputError(f"steps={steps!r}: it is 0, or how many gradients to average.")
    check_processing(model, clean_cache)
    if isinstance(metric, (list, tuple, dict)):
        raise InputError("edges are scored by one metric, not by several.")
    run = model._edge_run(corrupted_tokens, clean_cache, metric, **forward_options)
    bound = run.sweeper._metrics[0]
    values = model._edge_scores(run, bound, steps)
    labels = {"edge": [str(edge) for edge in run.edges]}
    metadata = {"model": model.cfg.model_name, "metrics": [bound.name if hasattr(bound, "name") else "metric"]}
    return SweepResult(values, ("edge",), labels, {"corrupted": 0.0}, metadata)


def faithfulness(
    model: Any,
    corrupted_tokens: Any,
    clean_cache: Mapping[str, Any],
    metric: Any,
    circuits: Mapping[Any, Iterable[str]],
    **forward_options: Any,
) -> SweepResult:
    """The metric with every edge outside a circuit patched to the corrupted run, for several circuits: an axis "circuit".

    ``circuits``: names (say, numbers of edges) -> edges by label. In each run the edges of the circuit carry what their
    senders write in that run, beginning with the clean embeddings; all others carry what the corrupted run wrote. All
    edges give the clean run, none the corrupted one; ``metric.normalised()`` makes of it the usual faithfulness.
    """
    check_processing(model, clean_cache)
    run = model._edge_run(corrupted_tokens, clean_cache, metric, **forward_options)
    known = {str(edge): edge for edge in run.edges}
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
        logits = model._circuit_logits(run, [known[label] for label in labels])
        values.append(run.sweeper._measuring.of(run.sweeper._metrics[0], logits))
    baselines = {"corrupted": run.sweeper.corrupted[0], "clean": run.sweeper.clean[0]}
    names = {"circuit": [str(name) for name in circuits]}
    return SweepResult(np.stack(values), ("circuit",), names, baselines, {"model": model.cfg.model_name})
