"""Attribution graphs: which features of transcoders, by which linear effects on one another, make a prediction."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, Unpack

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT
from graphlens.analysis.attribution_graph import ERROR, FEATURE, LOGIT, TOKEN, AttributionGraph, GraphNode
from graphlens.edits.sae import Sae
from graphlens.engine.block_layout import MLP_OUT
from graphlens.errors import InputError, InputTypeError, checked_number, warn
from graphlens.experiments.frozen_effects import EMBEDDED, PRE, FrozenModel
from graphlens.file.names import UNEMBEDDED, canonical, in_block
from graphlens.views.progress import steps

if TYPE_CHECKING:
    from graphlens.file.manifest import Json
    from graphlens.model.hooked_transformer import HookedTransformer
    from graphlens.model.request import ForwardOptions
    from graphlens.model.runner import Runner
    from graphlens.model.text import Input

# Flags with which a norm fires three times, and which change no number.
_SPLITTING = ("use_split_qkv_input", "use_attn_in")
_CHUNK = 256  # targets whose effects are computed before the next ones are chosen by influence
_ADDS_UP = (
    1e-2  # what a target reads and what arrives there differ by at most, as a share of the largest that one reads
)


def attribution_graph(
    model: HookedTransformer[ArrayT],
    saes: Sequence[Sae],
    prompt: Input[ArrayT],
    *,
    max_features: int = 5000,
    max_n_logits: int = 10,
    desired_logit_prob: float = 0.95,
    without_features_at: Sequence[int] = (),
    verbose: bool = True,
    **options: Unpack[ForwardOptions[ArrayT]],
) -> AttributionGraph:
    """Finds which features make the next token of a prompt, and how they act on one another (Ameisen et al. 2025).

    Each block's MLP is a transcoder and its error in this run. With these, attention patterns and the scales of norms held as
    they are in the run, the model is linear: what a feature reads before its activation function, its pre-activation, is a sum of
    effects of features, errors and tokens, and of what biases make. Those effects are the edges. A logit is less the mean of all
    logits, and before any soft cap.

    Args:
        model: The model.
        saes: A transcoder for every block, in any order.
        prompt: Text or tokens [1, p].
        max_features: How many features there are at most: those of most influence. A warning says how many there were.
        max_n_logits: How many logits there are at most.
        desired_logit_prob: Logits are taken from the likeliest on, until they have this probability together.
        without_features_at: Positions whose features count among the errors: 0 for a BOS token, where many features that mean
            nothing are active.
        verbose: Whether a terminal shows a progress bar.
        **options: The arguments of ``forward`` by name: ``prepend_bos``, say.

    Returns:
        The graph, of all nodes: ``.prune()`` leaves those that matter, ``.page("graph.html")`` and ``.to_json("graph.json")``
        write it.

    Raises:
        UnknownHookPoint: The model lacks a hook point of a transcoder.
        InputError: A block has no transcoder or two, an SAE is no transcoder of an MLP or of another model's width, there are
            several prompts, something is active in the model, or the model is not linear with these held.
    """
    most = checked_number(max_features, "max_features", least=1)
    logits = checked_number(max_n_logits, "max_n_logits", least=1)
    share = checked_number(desired_logit_prob, "desired_logit_prob", float, least=0.0, most=1.0)
    runner = model.runner
    if not runner.active().of_file:
        raise InputError(
            "an attribution graph is of the plain model: leave the hooks(), intervene() or saes() block first, or call "
            "reset_saes()."
        )
    ordered = _by_block(runner, saes)
    writes = [canonical(sae.cfg.writes, runner.engine.hook_names) for sae in ordered]
    with model.saes(ordered, use_error_term=True):
        request = runner.whole_prompts(prompt, **options)
        flags = tuple(flag for flag in request.plan.flags if flag not in _SPLITTING)
        request = replace(request, plan=replace(request.plan, flags=flags))
        if request.shape[0] != 1:
            raise InputError(f"an attribution graph is of one prompt, and there are {request.shape[0]}.")
        if request.mask is not None and not request.mask.all():
            raise InputError("an attribution graph is of a prompt without padding: leave attention_mask out.")
        left_out = [
            checked_number(at, "a position of without_features_at", least=-request.shape[1], most=request.shape[1] - 1)
            % request.shape[1]
            for at in without_features_at
        ]
        frozen = FrozenModel.of(runner, request, ordered, writes, left_out)
        targets = _Logits.of(runner, frozen.logits, logits, share)
        found = _Search(frozen, targets, most, verbose).done()
        zero = frozen.at_zero()
    settings: dict[str, Json] = {
        "model": runner.config.model_name,
        "prompt": _text(runner, request.need_tokens()[0]),
        "transcoders": [str(sae.cfg.metadata.get("name", sae.cfg.writes)) for sae in ordered],
        "max_n_logits": logits,
        "desired_logit_prob": share,
        "max_feature_nodes": most,
        "without_features_at": list(left_out),
    }
    return _assembled(runner, frozen, targets, found, zero, settings)


def _by_block(runner: Runner[ArrayT], saes: Sequence[Sae]) -> list[Sae]:
    """The transcoders, one for each block, in order."""
    if isinstance(saes, Sae):
        saes = [saes]
    found: dict[str, Sae] = {}
    config, names = runner.config, runner.engine.hook_names
    wanted = [in_block(layer, MLP_OUT) for layer in range(config.n_layers)]
    for sae in saes:
        if not isinstance(sae, Sae):
            raise InputTypeError(f"saes: a list of graphlens.Sae is wanted, and it holds a {type(sae).__name__}.")
        cfg, writes = sae.cfg, canonical(sae.cfg.writes, names)
        if not cfg.is_transcoder or writes not in wanted:
            raise InputError(
                f"the SAE of {cfg.architecture!r} at {cfg.writes!r} is no transcoder of an MLP of this model: these read "
                f"what an MLP reads and write {wanted[0]!r} to {wanted[-1]!r}."
            )
        if cfg.normalize_activations not in ("none", "expected_average_only_in"):
            raise InputError(
                f"the transcoder at {cfg.writes!r} normalises what it reads ({cfg.normalize_activations!r}), so its features are "
                "no linear functions of it."
            )
        if writes in found:
            raise InputError(f"two transcoders write {writes!r}: give one for each block.")
        found[writes] = sae
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(
            f"there is no transcoder for {len(missing)} of {len(wanted)} MLPs, {missing[0]!r} first: an attribution graph needs "
            "one for each."
        )
    if UNEMBEDDED not in names or EMBEDDED not in names:
        raise InputError(
            f"this file has no hook point {UNEMBEDDED!r} or {EMBEDDED!r}, where the graph begins and ends."
        )
    return [found[name] for name in wanted]


@dataclass(frozen=True)
class _Logits:
    """The likeliest next tokens, and what each logit reads of the last residual."""

    ids: Array  # int64[logit]
    probabilities: Array  # float64[logit]
    directions: Array  # float32[logit, d_model]
    constants: Array  # float64[logit]: what b_U adds

    @classmethod
    def of(cls, runner: Runner[ArrayT], logits: Array, most: int, share: float) -> _Logits:
        shifted = np.exp(logits - logits.max())
        probabilities = shifted / shifted.sum()
        order = np.argsort(-probabilities, kind="stable")[:most]
        count = int(np.searchsorted(np.cumsum(probabilities[order]), share)) + 1
        ids = order[:count]
        w_u = np.asarray(runner.weights["unembed.W_U"], np.float32)
        directions = w_u[:, ids].T - w_u.mean(axis=1, dtype=np.float64).astype(np.float32)
        bias = runner.weights["unembed.b_U"] if "unembed.b_U" in runner.weights else None
        b_u = np.zeros(len(logits)) if bias is None else np.asarray(bias, np.float64)
        return cls(ids, probabilities[ids], directions, b_u[ids] - b_u.mean())


@dataclass(frozen=True)
class _Found:
    """The effects on the targets that were chosen: features by their place among the active ones, then logits."""

    features: Array  # int64[n]: the features that are nodes
    rows: Sequence[Array]  # float32[source] for each of them, then for each logit


class _Search(Generic[ArrayT]):
    """The effects on every target; of more features than wanted on those of most influence, as far as is known yet."""

    def __init__(self, frozen: FrozenModel[ArrayT], logits: _Logits, most: int, verbose: bool) -> None:
        self._frozen, self._logits, self._verbose = frozen, logits, verbose
        self._active = len(frozen.features)
        self._most = min(most, self._active)
        self._chosen: list[int] = []  # features, in the order of the rows
        self._first = len(logits.ids)  # the row of the first of them: those of logits come before
        self._rows = np.zeros((self._first + self._most, frozen.sources), np.float32)

    def done(self) -> _Found:
        """Computes them."""
        frozen = self._frozen
        if self._most < self._active:
            warn(
                f"{self._active:,} features are active in this prompt, and the graph has the {self._most:,} of most influence "
                f"(max_features={self._most}): what the others add is in its others. A shorter prompt has fewer."
            )
        ends = np.full(self._first, frozen.length - 1)
        self._rows[: self._first] = frozen.effects(len(frozen.saes), ends, self._logits.directions)
        with steps("Effects", self._most, "features") if self._verbose else nullcontext() as progress:
            while len(self._chosen) < self._most:
                chosen = self._next()
                layers = frozen.features.layers[chosen]
                for layer in np.unique(layers).tolist():
                    some = chosen[layers == layer]
                    part = frozen.features.part(some)
                    directions = np.asarray(frozen.saes[layer].W_enc[:, part.numbers].T, np.float32)
                    start = self._first + len(self._chosen)
                    self._rows[start : start + len(some)] = frozen.effects(layer, part.positions, directions)
                    self._chosen += some.tolist()
                    if progress is not None:
                        progress.advance(len(some))
        order = np.argsort(self._chosen)
        rows = [*(self._rows[self._first + each] for each in order.tolist()), *self._rows[: self._first]]
        return _Found(np.asarray(self._chosen, np.int64)[order], rows)

    def _next(self) -> Array:
        """The features whose effects are computed next."""
        count = min(_CHUNK, self._most - len(self._chosen))
        if self._most == self._active:
            return np.arange(len(self._chosen), len(self._chosen) + count)
        known = self._first + len(self._chosen)
        sizes = np.concatenate([np.abs(self._rows[at : at + _CHUNK]).sum(1) for at in range(0, known, _CHUNK)])[:known]
        scores, reached = np.zeros(self._active), np.zeros(known)
        reached[: self._first] = self._logits.probabilities
        while reached.any():  # a step of every way from the logits: there are no circles
            by_size = np.divide(reached, sizes, out=np.zeros(known), where=sizes > 0).astype(np.float32)
            arriving = np.zeros(self._frozen.sources, np.float32)
            for at in range(0, known, _CHUNK):
                rows = self._rows[at : min(at + _CHUNK, known)]
                arriving += by_size[at : at + len(rows)] @ np.abs(rows)
            scores += arriving[: self._active]
            reached = np.zeros(known)
            reached[self._first :] = arriving[self._chosen]
        scores[self._chosen] = -1.0
        return np.argsort(-scores, kind="stable")[:count]


def _assembled(
    runner: Runner[ArrayT],
    frozen: FrozenModel[ArrayT],
    logits: _Logits,
    found: _Found,
    zero: dict[str, Array],
    metadata: dict[str, Json],
) -> AttributionGraph:
    """The graph of what was found. Raises InputError if it does not add up."""
    chosen, active, length, blocks = found.features, len(frozen.features), frozen.length, len(frozen.saes)
    part = frozen.features.part(chosen)
    ids = frozen.request.need_tokens()[0]
    columns = zip(
        part.layers.tolist(), part.positions.tolist(), part.numbers.tolist(), part.values.tolist(), strict=True
    )
    nodes = [GraphNode(FEATURE, *each) for each in columns]
    norms = np.linalg.norm(frozen.errors, axis=-1)
    nodes += [GraphNode(ERROR, k, p, -1, float(norms[k, p])) for k in range(blocks) for p in range(length)]
    lengths = np.linalg.norm(np.asarray(frozen.values[EMBEDDED][0], np.float32), axis=-1)
    nodes += [GraphNode(TOKEN, -1, p, int(ids[p]), float(lengths[p])) for p in range(length)]
    first = len(nodes)
    likely = zip(logits.ids.tolist(), logits.probabilities.tolist(), strict=True)
    nodes += [GraphNode(LOGIT, blocks, length - 1, token, chance) for token, chance in likely]
    # Columns: those of features that are no nodes go into others.
    columns_of_nodes = np.concatenate([chosen, np.arange(active, frozen.sources)])
    targets = np.concatenate([np.arange(len(chosen)), first + np.arange(len(logits.ids))])
    readings, biases, others = (np.full(len(nodes), np.nan) for _ in range(3))
    sources: list[Array] = []
    weights: list[Array] = []
    for target, row in zip(targets, found.rows, strict=True):
        kept = row[columns_of_nodes]
        others[target] = row.sum(dtype=np.float64) - kept.sum(dtype=np.float64)
        there = np.flatnonzero(kept)
        sources.append(there.astype(np.int32))
        weights.append(kept[there])
    for layer, name in enumerate(frozen.writes):
        here = np.flatnonzero(part.layers == layer)
        at = (0, part.positions[here], part.numbers[here])
        readings[here], biases[here] = frozen.values[f"{name}.{PRE}"][at], zero[f"{name}.{PRE}"][at]
    for values, of in ((readings, frozen.values), (biases, zero)):
        last = np.asarray(of[UNEMBEDDED][0, -1], np.float64)
        values[first:] = logits.directions.astype(np.float64) @ last + logits.constants
    outputs = ["" if node.kind in (FEATURE, ERROR) else _text(runner, [node.number]) for node in nodes]
    graph = AttributionGraph(
        tokens=tuple(_text(runner, [each]) for each in ids.tolist()),
        nodes=tuple(nodes),
        sources=np.concatenate(sources),
        targets=np.repeat(targets, [len(each) for each in sources]).astype(np.int32),
        weights=np.concatenate(weights),
        readings=readings,
        biases=biases,
        others=others,
        outputs=tuple(outputs),
        metadata=metadata,
    )
    apart, largest = np.nanmax(np.abs(graph.gaps)), np.nanmax(np.abs(readings))
    if not apart <= _ADDS_UP * max(1.0, largest):
        raise InputError(
            f"the effects do not add up to what features read ({apart:.1e} off, of up to {largest:.1e}): this model does more "
            "than products and sums between its MLPs, with attention patterns and norms held, or computes in too few bits."
        )
    return graph


def _text(runner: Runner[ArrayT], ids: Sequence[int] | Array) -> str:
    """Tokens as text; as their ids for a model without tokenizer."""
    if runner.text.tokenizer is None:
        return " ".join(str(int(each)) for each in ids)
    return "".join(runner.text.of_each([int(each) for each in ids]))
