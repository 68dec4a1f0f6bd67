"""The frozen model: what its sources add to what a target reads, by backward passes with patterns and norms held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Generic

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT
from graphlens.edits.kinds import Ablate, Patch, checked
from graphlens.edits.sae import Sae
from graphlens.errors import InputError
from graphlens.file.io_names import SEED, gradient_output
from graphlens.file.names import UNEMBEDDED
from graphlens.file.sae_names import ERROR, HOOKS, INPUT, OUTPUT

if TYPE_CHECKING:
    from graphlens.engine.plan import Plan
    from graphlens.model.request import Request
    from graphlens.model.runner import Runner

EMBEDDED = "hook_embed"
PRE, POST, RECONS = HOOKS[1], HOOKS[2], HOOKS[3]
_HELD = ("attn.hook_pattern", ".hook_scale")  # what attention and norms are frozen at, in every block
_TOKENS_AT_ONCE = 4096  # of the backward passes in one run


@dataclass(frozen=True)
class Features:
    """The features that are active in a run.

    Attributes:
        layers: int32[feature].
        positions: int32[feature].
        numbers: int32[feature]: each one's place in its transcoder.
        values: float32[feature]: activations.
    """

    layers: Array
    positions: Array
    numbers: Array
    values: Array

    def __len__(self) -> int:
        return len(self.layers)

    def part(self, chosen: slice | Array) -> Features:
        """Some of them.

        Args:
            chosen: Which, as NumPy indexes.
        """
        return Features(*(each[chosen] for each in (self.layers, self.positions, self.numbers, self.values)))


@dataclass(frozen=True)
class FrozenModel(Generic[ArrayT]):
    """One run of a model with transcoders, in which attention patterns, norms' scales, features and errors are held.

    Attributes:
        runner: Runs the model; the transcoders are attached.
        request: The run, of one prompt.
        saes: The transcoder of each block.
        writes: The hook point that each stands for.
        values: What was read in the run, by hook name.
        logits: float64[V]: those of the last position.
        errors: float32[layer, p, d_model]: what the transcoders do not account for.
        features: The active features, by layer, position and number.
        held: The hook points that are held.
    """

    runner: Runner[ArrayT]
    request: Request
    saes: Sequence[Sae]
    writes: Sequence[str]
    values: Mapping[str, Array]
    logits: Array
    errors: Array
    features: Features
    held: tuple[str, ...]
    _whole: set[int] = field(default_factory=set)  # blocks whose backward pass does not run alone

    @classmethod
    def of(
        cls,
        runner: Runner[ArrayT],
        request: Request,
        saes: Sequence[Sae],
        writes: Sequence[str],
        without: Sequence[int],
    ) -> FrozenModel[ArrayT]:
        """Runs the prompt.

        Args:
            runner: See above, as for the next three.
            request: See there.
            saes: See there.
            writes: See there.
            without: Positions whose features count among the errors.
        """
        held = tuple(name for name in runner.engine.passed(request.plan) if name.endswith(_HELD))
        read = [f"{name}.{each}" for name in writes for each in (PRE, POST, RECONS, ERROR)]
        ran = runner.run(request, [EMBEDDED, UNEMBEDDED, *held, *read])
        values = ran.values
        posts = np.stack([values[f"{name}.{POST}"][0] for name in writes])
        errors = np.stack([values[f"{name}.{ERROR}"][0] for name in writes])
        for at in without:
            decoded = [values[f"{name}.{RECONS}"][0, at] - sae.b_dec for name, sae in zip(writes, saes, strict=True)]
            errors[:, at] += np.stack(decoded)
            posts[:, at] = 0
        layers, positions, numbers = (each.astype(np.int32) for each in np.nonzero(posts))
        found = Features(layers, positions, numbers, posts[posts != 0])
        logits = ran.logits[0, -1].astype(np.float64)
        return cls(runner, request, saes, writes, values, logits, errors, found, held)

    @property
    def length(self) -> int:
        """The number of tokens of the prompt."""
        return self.request.shape[1]

    @property
    def sources(self) -> int:
        """How many sources there are: active features, an error of each block and position, tokens."""
        return len(self.features) + (len(self.saes) + 1) * self.length

    def read_by(self, layer: int) -> str:
        """The hook point that the targets of a block read; of the logits, for the number of blocks.

        Args:
            layer: The block.
        """
        return f"{self.writes[layer]}.{INPUT}" if layer < len(self.saes) else UNEMBEDDED

    def at_zero(self) -> dict[str, Array]:
        """What targets read where every source is 0: what biases and positions alone make.

        Returns:
            The pre-activations of each block, and ``unembed.hook_in``, by hook name.
        """
        zeroed = [EMBEDDED, *(f"{name}.{each}" for name in self.writes for each in (POST, ERROR))]
        edits = [*(Patch(name, self.values[name]) for name in self.held), *(Ablate(name) for name in zeroed)]
        wanted = [*(f"{name}.{PRE}" for name in self.writes), UNEMBEDDED]
        with self.runner.edits.adding(checked(edits), self.request.plan, True):
            return self.runner.run(self.request, wanted, output=False).values

    def effects(self, layer: int, positions: Array, directions: Array) -> Array:
        """What each source adds to what targets read.

        Args:
            layer: The block of the targets; the number of blocks for logits.
            positions: int32[target].
            directions: float32[target, width]: what each target takes of what ``read_by`` names, by its product.

        Returns:
            float32[target, source]: active features, then errors by block and position, then tokens. 0 for what comes later.
        """
        found = np.zeros((len(positions), self.sources), np.float32)
        some = max(1, _TOKENS_AT_ONCE // self.length)
        for first in range(0, len(positions), some):
            part = slice(first, first + some)
            gradients = self._gradients(layer, positions[part], directions[part])
            self._spread(layer, gradients, found[part])
        return found

    def _gradients(self, layer: int, positions: Array, directions: Array) -> list[Array]:
        """The gradients at the embeddings and at what each block below a target's writes, float32 [target, p, d_model] each."""
        below = (EMBEDDED, *(f"{name}.{OUTPUT}" for name in self.writes[:layer]))
        of = self.read_by(layer)
        held = (*self.held, *(f"{name}.{POST}" for name in self.writes))
        plan = replace(self.request.plan, gradients=below, of=of, held=held)
        dtype = self.runner.engine.hooks(self.request.plan)[of].dtype
        seed = np.zeros((len(positions), self.length, directions.shape[1]), dtype)
        seed[np.arange(len(positions)), positions] = directions
        return [np.asarray(each, np.float32) for each in self._backward(layer, plan, seed)]

    def _backward(self, layer: int, plan: Plan, seed: Array) -> Sequence[Array]:
        """The gradients of a plan: of its backward pass alone, where that can be cut out, and of the whole graph elsewhere."""
        engine, names = self.runner.engine, [gradient_output(name) for name in plan.gradients]
        if layer not in self._whole:
            try:
                session = engine.part([SEED], names, self.held, plan)
            except InputError:  # a graph from elsewhere does not tell all of its sizes
                self._whole.add(layer)
            else:
                feeds = {name: self.values[name] for name in self.held if name in session.inputs}
                return session.run(names, {SEED: seed, **feeds})
        copies = self.request.repeated(len(seed))
        found = engine.run({**copies.feeds, SEED: seed}, names, output=False, plan=plan).values
        return [found[name] for name in names]

    def _spread(self, layer: int, gradients: Sequence[Array], into: Array) -> None:
        """Multiplies gradients by what each source writes, and puts the effects in their places."""
        features, length = self.features, self.length
        errors = len(features)
        for below, gradient in enumerate(gradients[1:]):
            start = errors + below * length
            into[:, start : start + length] = np.einsum("tpd,pd->tp", gradient, self.errors[below])
            first, last = np.searchsorted(features.layers, [below, below + 1])
            rows = self.written(features.part(slice(first, last)))
            ends = first + np.searchsorted(features.positions[first:last], np.arange(length + 1))
            for at in range(length):
                here = slice(ends[at], ends[at + 1])
                into[:, here] = gradient[:, at] @ rows[ends[at] - first : ends[at + 1] - first].T
        embedded = np.asarray(self.values[EMBEDDED][0], np.float32)
        into[:, self.sources - length :] = np.einsum("tpd,pd->tp", gradients[0], embedded)

    def written(self, features: Features) -> Array:
        """What features of one block write: float32[feature, d_model].

        Args:
            features: Features of one block.
        """
        if not len(features):
            return np.zeros((0, self.errors.shape[-1]), np.float32)
        sae = self.saes[int(features.layers[0])]
        rows = np.asarray(sae.W_dec[features.numbers], np.float32)
        if sae.cfg.rescale_acts_by_decoder_norm:
            rows = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
        return rows * features.values[:, None]
