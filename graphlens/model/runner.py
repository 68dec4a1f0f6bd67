"""One run with what is active. Every forward, backward, step of generation and whole run of an experiment is made here."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT
from graphlens.analysis.metric import Metric
from graphlens.edits.kinds import Intervention, checked
from graphlens.engine.engine import Engine
from graphlens.engine.plan import Plan
from graphlens.engine.results import LAST
from graphlens.errors import InputError, warn
from graphlens.file.io_names import gradient_output
from graphlens.file.manifest import ModelConfig
from graphlens.file.names import NamesFilter, select
from graphlens.file.tokenizer import Tokenizer
from graphlens.model import backward
from graphlens.model.active import Active, ActiveEdits
from graphlens.model.backward import Differentiated, Seed
from graphlens.model.border import Border
from graphlens.model.encoder_request import EncoderReader, EncoderText
from graphlens.model.flags import Flags
from graphlens.model.hooks import BACKWARD, HookRegistry
from graphlens.model.per_thread import Block
from graphlens.model.ran import Ran, Snapshot
from graphlens.model.request import Reader, Request
from graphlens.model.runner_hooks import RunnerHooks
from graphlens.model.text import Input, Text
from graphlens.model.vision_request import VisionReader
from graphlens.model.weights import Weights

Interventions = Iterable[Intervention] | Intervention
MetricT = TypeVar("MetricT", bound=Metric)


class Runner(Generic[ArrayT]):
    """Runs a model with the hooks, interventions and flags that are active in this thread.

    Args:
        engine: The hooked file, ready to run.
        border: How arrays cross to the user.
        tokenizer: None for a model without one.
        default_prepend_bos: Whether text gets a BOS token where a call does not say.

    Attributes:
        engine: See above.
        border: See above.
        text: Its tokens and text.
        weights: Its weights by name.
        flags: Which flagged hook points and SAEs there are.
        hooks: Its Python hooks.
        edits: Its interventions.
    """

    def __init__(
        self,
        engine: Engine,
        border: Border[ArrayT],
        tokenizer: Tokenizer | None = None,
        default_prepend_bos: bool = True,
    ) -> None:
        self.engine, self.border = engine, border
        kind = EncoderText if engine.manifest.config.is_encoder else Text
        self.text: Text[ArrayT] = kind(engine, border, tokenizer, default_prepend_bos)
        self.weights = Weights(engine)
        self.flags = Flags()
        self.hooks: HookRegistry = border.registry(self) or RunnerHooks(self)
        self.edits = ActiveEdits(engine)
        self._reader = self._reader_of(engine, self.text)

    @staticmethod
    def _reader_of(engine: Engine, text: Text[ArrayT]) -> Reader[ArrayT]:
        """What reads the arguments of ``forward``."""
        config = engine.manifest.config
        kind = VisionReader if config.is_vision else EncoderReader if config.is_encoder else Reader
        return kind(engine, text)

    def copy(self) -> Runner[ArrayT]:
        """A runner of the same model with a tokenizer and interventions of its own; hooks and flags are shared."""
        other: Runner[ArrayT] = object.__new__(type(self))
        other.__dict__ |= {**self.__dict__, "text": copy.copy(self.text)}
        other.edits = ActiveEdits(self.engine)
        other._reader = self._reader_of(self.engine, other.text)
        return other

    def use(self, engine: Engine) -> None:
        """Goes on with another engine over the same file: one that computes with other weights.

        Args:
            engine: It has the same hook points. What is active stays active.
        """
        self.engine, self.weights = engine, Weights(engine)
        self.text.use(engine)
        self.edits.use(engine)
        self._reader = self._reader_of(engine, self.text)

    # Hooks and interventions belong to whoever set them: a copy of either kind has none.

    def __deepcopy__(self, memo: dict[int, object]) -> Runner[ArrayT]:
        text = (copy.deepcopy(self.text.tokenizer, memo), self.text.default_prepend_bos)
        other = memo[id(self)] = Runner(self.engine, self.border, *text)
        other.text.default_padding_side, other.flags = self.text.default_padding_side, copy.deepcopy(self.flags, memo)
        return other

    def __reduce__(self) -> tuple[object, ...]:
        asked = (self.engine.path.absolute(), self.engine.asked, self.config.n_ctx, self.engine.max_memory)
        text = (self.border, self.text.tokenizer, self.text.default_prepend_bos)
        weights = {name: np.array(value) for name, value in self.engine.replaced.items()}
        return _opened, (asked, self.engine.files.identity, text, self.text.default_padding_side, self.flags, weights)

    def set_flag(self, flag: str, on: bool) -> None:
        """Sets or unsets a flag.

        Args:
            flag: Its name in the configuration ("use_attn_result", say).
            on: True sets it.

        Raises:
            InputError: For one that excludes another that is set, and for one that this model cannot have; it is not set
                then.
        """
        self.flags.set(flag, on)
        if on:
            try:
                self.names()
            except InputError:
                self.flags.set(flag, False)
                raise

    # What there is

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.engine.manifest.config

    @property
    def identity(self) -> str:
        """A digest that tells this model from any other, whatever they are called."""
        return self._reader.identity

    def plan(self) -> Plan:
        """The plan of whole runs with the flags that are set and the SAEs, without what else is active."""
        return self.flags.plan()

    def names(self) -> list[str]:
        """The hook points there are now, in firing order."""
        return self.engine.names(self.plan())

    def weight(self, name: str) -> ArrayT:
        """A weight as the user's kind of array.

        Args:
            name: Its TransformerLens name.

        Raises:
            AttributeError: If the model has no weight of that name.
        """
        return self.border.weight_to_user(self.weights[name], name)

    def select(self, names_filter: NamesFilter, request: Request) -> list[str]:
        """The hook points of a run that a ``names_filter`` picks, in firing order.

        Args:
            names_filter: A hook name, a list of them, or a function name -> bool; None for all.
            request: The run.

        Returns:
            Their own names, also where an alias was given.

        Raises:
            UnknownHookPoint: For a name that is none, and for a filter that matches nothing.
            InputError: For a name that this run leaves out.
        """
        layers, passed = self.config.n_layers, self.engine.passed(request.plan)
        if isinstance(names_filter, (str, list, tuple)):
            asked = select(self.names(), names_filter, layers)
            left_out = [name for name in asked if name not in passed]
            if left_out:
                raise InputError(
                    f"{left_out[0]!r} is not computed in this run: start_at_layer or stop_at_layer leaves it out."
                )
            return asked
        return select(list(passed), names_filter, layers) if passed else []

    def bound(self, metric: MetricT, mask: Array | None) -> MetricT:
        """A metric with token ids in place of text, that leaves out the padding of a run.

        Args:
            metric: One of graphlens.metrics.
            mask: The run's, 0 at padding; None where there is none.

        Raises:
            InputError: If it holds text and there is no tokenizer, or text that is not one token; and what
                ``metric.masked`` raises.
        """
        known = metric.bound(self.text.single_token if self.text.tokenizer is not None else None)
        return known.masked(mask)

    # What is active

    def active(self) -> Active:
        """What is active in this thread beside the plain model."""
        hooks = tuple((hook.name, getattr(hook.user_hook, "__qualname__", "")) for hook in self.hooks.active())
        saes = tuple((one.writes, one.key, one.error_term, one.excluded, one.beside) for one in self.flags.saes.now)
        return Active(self.flags.names, self.edits.items, hooks, saes)

    def editing(self, interventions: Interventions, strict: bool = True) -> Block[None]:
        """Adds interventions to every run inside the ``with`` block; see HookedTransformer.intervene.

        Args:
            interventions: One, or several.
            strict: False ignores positions beyond the sequence.

        Raises:
            UnknownHookPoint: For a hook point that is not there.
            InputError: For what the model lacks or what cannot fit.
        """
        return self.edits.adding(checked(interventions), self.plan(), strict)

    def snapshot(self) -> Snapshot:
        """The hooks and interventions that are active now, to run with later."""
        return Snapshot(self.hooks.snapshot(), self.edits.items)

    # Running

    def request(self, input: Input[ArrayT], *forward_args: Any, **forward_options: Any) -> Request:
        """The request of a call of ``forward``: its arguments, checked, as a plan and feeds.

        Args:
            input: See ``HookedTransformer.forward``.
            *forward_args: The arguments of ``forward`` from ``prepend_bos`` on.
            **forward_options: The same by name.

        Raises:
            InputError: For arguments that do not fit the model or each other.
        """
        return self._reader.request(self.plan(), input, *forward_args, **forward_options)

    def whole_prompts(self, input: Input[ArrayT], **forward_options: Any) -> Request:
        """A request over whole prompts, as gradients and experiments take them.

        Args:
            input: Text or tokens [b, p].
            **forward_options: The arguments of ``forward`` by name.

        Raises:
            InputError: For a run over some layers only or with a KV cache, and what ``request`` raises.
        """
        return self._reader.whole_prompts(self.plan(), input, **forward_options)

    def run(self, request: Request, fetch: Sequence[str] = (), output: bool = True, only: bool = False) -> Ran:
        """Runs a request once with what is active, and extends its KV cache.

        Args:
            request: The run.
            fetch: The hook points whose activations are wanted.
            output: False leaves out the logits (or the residual stream, where the run stops early).
            only: True for a graph that ends with what is fetched: for many runs that fetch the same. Needs ``output=False``.

        Returns:
            The output and the activations.

        Raises:
            InputError: For a hook or intervention that this run does not pass.
            HookResultError: For what a hook returned; and whatever a hook raises.
        """
        learned: list[str] = []
        names, alone = self.engine.passed(request.plan), request.alone
        callbacks = self.hooks.callbacks(self.border, names, elsewhere=alone, learned=learned)
        plan, edits = self.edits.gates(request.plan, request.window, elsewhere=alone)
        if request.bare and not callbacks:
            plan = replace(plan, bare=True)
        if only:
            plan = replace(plan, reads=tuple(fetch))
        which = LAST if output and request.bare and not request.alone else output
        results = self.engine.run(request.feeds, fetch, callbacks, which, plan, edits)
        if request.cache is not None:
            mask = np.ones(request.shape, np.int64) if request.mask is None else request.mask
            owner = (request.owner,) if request.owner else ()  # the cache of a generation belongs to nobody else
            request.cache.extend(results.present, mask, *owner)
        return Ran(results.output, results.values, learned)

    def run_backward(
        self,
        request: Request,
        seed: Seed,
        wrt: Sequence[str],
        fetch: Sequence[str] = (),
        output: bool = False,
        graph_of: Sequence[str] = (),
    ) -> Ran:
        """Runs a request forward and backward with what is active.

        Args:
            request: The run.
            seed: What goes backward from the logits.
            wrt: The hook points whose gradients are wanted; those of active backward hooks are computed for them.
            fetch: The hook points whose activations are wanted.
            output: True for the logits too.
            graph_of: Hook points whose gradients the graph has besides, so that runs for each of them share a session.

        Returns:
            The activations, and the gradients as ``<name>_grad``, among the values.

        Raises:
            InputError: For a hook point that fires several times, and what ``run`` raises.
        """
        possible = self.differentiable(request.plan)
        for name in (*wrt, *graph_of):
            if name not in possible and self.engine.hooks(request.plan)[name].dtype.startswith("float"):
                raise InputError(
                    f"{name!r} fires for queries, keys and values apart while inputs are split, so it has no one gradient: "
                    "switch use_split_qkv_input and use_attn_in off, or take hook_q_input, hook_k_input and hook_v_input."
                )
        backward_hooks = self.hooks.callbacks(self.border, possible, BACKWARD)
        names = self.engine.passed(request.plan)
        changing: list[str] = []
        callbacks = {
            **{
                name: backward.noting(name, callback, changing)
                for name, callback in self.hooks.callbacks(self.border, names).items()
            },
            **{gradient_output(name): callback for name, callback in backward_hooks.items()},
        }
        chosen = {*wrt, *graph_of, *backward_hooks}
        order = [name for name in names if name in chosen]
        plan, edits = self.edits.gates(request.plan, request.window)
        if not order:  # nothing asked for, and no backward hook
            results = self.engine.run(request.feeds, fetch, callbacks, output, plan, edits)
            return Ran(results.output, results.values)
        plan = replace(plan, gradients=tuple(order), seed=seed.kind)
        wanted = [*fetch, *(gradient_output(name) for name in reversed(order) if name in set(wrt))]
        results = self.engine.run({**request.feeds, **seed.feeds}, wanted, callbacks, output, plan, edits)
        if changing:
            warn(
                f"the forward hook at {changing[0]!r} changed its activation: a Python function has no derivative, so "
                "gradients pass it as if it had added a constant. Use interventions (model.intervene) for edits that count."
            )
        return Ran(results.output, results.values, straight_through=results.straight_through)

    def run_loss(self, request: Request, fetch: Sequence[str], wrt: Sequence[str]) -> Ran:
        """Runs a request forward, and backward from its mean next-token loss.

        Args:
            request: The run.
            fetch: The hook points whose activations are wanted.
            wrt: The hook points whose gradients are wanted. Those that have none are left out.

        Returns:
            The logits, the activations, and the gradients as ``<name>_grad``.

        Raises:
            InputError: For a run with a KV cache or without tokens, and what ``run_backward`` raises.
        """
        seed = backward.loss_seed(request, self.config.dtype)
        possible = self.differentiable(request.plan)
        return self.run_backward(request, seed, [name for name in wrt if name in possible], fetch, output=True)

    def seed(self, request: Request, metric: Differentiated[ArrayT], each: bool = False) -> Seed:
        """The gradient of a metric with respect to the logits of a run; see ``backward.metric_seed``.

        Args:
            request: The run.
            metric: One of graphlens.metrics with a mean over the batch, or an object with ``gradient(logits)``.
            each: True takes a number for each prompt too: each row has its own prompt's gradient.

        Raises:
            InputError: For a metric without a derivative, or one that does not fit the run.
        """
        return backward.metric_seed(self, request, metric, each)

    def differentiable(self, plan: Plan) -> set[str]:
        """The hook points that have one gradient in runs of a plan."""
        return backward.differentiable(self.engine, plan)


def _opened(
    asked: tuple[Any, ...],
    identity: str,
    text: tuple[Any, ...],
    side: str,
    flags: Flags,
    weights: dict[str, Array],
) -> Runner[Any]:
    """The runner that was pickled as this, its file opened again."""
    engine = Engine(*asked)
    engine.files.ensure_is(identity)
    runner = Runner(engine.with_weights(weights) if weights else engine, *text)
    runner.text.default_padding_side, runner.flags = side, flags
    return runner
