"""The TransformerLens-shaped object over a hooked file. NumPy in and out; graphlens.torch has the same in tensors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from graphlens.analysis import numerics
from graphlens.analysis.cache.activation_cache import ActivationCache
from graphlens.analysis.slices import of_positions
from graphlens.edits.gate import Window
from graphlens.engine.engine import Engine
from graphlens.errors import InputError
from graphlens.experiments.circuits import EdgeMethods
from graphlens.file.names import NamesFilter, axis_sizes, select
from graphlens.file.tokenizer import Tokenizer, load_tokenizer
from graphlens.model.config import HookedTransformerConfig, HookPointInfo
from graphlens.model.generate import GenerationMethods
from graphlens.model.hooks import HookDict, HookFunction, HookName, HookRegistry, Hooks
from graphlens.model.kv_cache import KeyValueCache
from graphlens.model.open import Pretrained
from graphlens.model.request import RETURN_TYPES, Output, Request
from graphlens.model.weights import ParameterMethods
from graphlens.runtime.providers import Providers
from graphlens.views.progress import spinner

Array = npt.NDArray[Any]
TokensOrText = Any


class HookedTransformer(Pretrained, GenerationMethods, EdgeMethods, ParameterMethods):
    """A hooked model: run it, read any activation, edit any activation.

    Made by ``from_pretrained``, ``from_pretrained_no_processing`` or ``from_onnx``. Tokens are integer arrays [b, p]
    or [p], nested lists, or strings; ``prepend_bos`` and ``padding_side`` apply to strings.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None = None,
        default_prepend_bos: bool | None = None,
        default_padding_side: str | None = None,
    ) -> None:
        self._engine = engine
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(engine.folder)
        usual = engine.manifest.config.default_prepend_bos
        self._default_prepend_bos = usual if default_prepend_bos is None else default_prepend_bos
        if default_padding_side is not None:  # otherwise the tokenizer's own
            self._default_padding_side = default_padding_side
        self._flags: set[str] = set()
        self._hooks = HookRegistry(self._names, engine.manifest.config.n_layers)

    @classmethod
    def from_onnx(
        cls,
        path: str | os.PathLike[str],
        providers: Providers = None,
        default_prepend_bos: bool | None = None,
        default_padding_side: str | None = None,
        tokenizer: Any = None,
        n_ctx: int | None = None,
    ) -> Self:
        """Opens a hooked folder or ``model.onnx``. Raises ModelFileError when it is damaged, altered or not hooked."""
        if default_padding_side not in ("left", "right", None):
            raise InputError(f"default_padding_side must be 'left' or 'right', not {default_padding_side!r}.")
        with spinner(f"Opening {path}"):
            engine = Engine(path, providers, n_ctx)
            if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
                tokenizer = Tokenizer.from_transformers(tokenizer)
            return cls(engine, tokenizer, default_prepend_bos, default_padding_side)

    # Describing

    @property
    def cfg(self) -> HookedTransformerConfig:
        """The configuration; see HookedTransformerConfig. ``normalization_type`` is "LNPre" once the norms are folded."""
        flags: dict[str, Any] = dict.fromkeys(self._flags, True)
        config = self._engine.manifest.config
        if "fold_ln" in self._engine.manifest.processing:
            config = replace(config, normalization_type=f"{config.normalization_type}Pre")
        return HookedTransformerConfig(
            **{**asdict(config), "default_prepend_bos": self._default_prepend_bos},
            device="cuda" if self.providers[0].startswith("CUDA") else "cpu",
            default_padding_side=self._default_padding_side,
            tokenizer_prepends_bos=None if self.tokenizer is None else self.tokenizer.prepends_bos,
            processing=self._engine.manifest.processing,
            **flags,
        )

    @property
    def dtype(self) -> str:
        """The dtype of weights and activations, e.g. "float32". A bfloat16 model stores bfloat16 and computes in float32,
        which it says: "bfloat16 weights, float32 activations"."""
        return self._engine.dtype

    @property
    def providers(self) -> list[str]:
        """The active execution providers, first choice first."""
        return self._engine.providers

    @property
    def hook_dict(self) -> HookDict:
        """Every hook point by name, in firing order; TransformerLens 4's names find them too."""
        return self._hooks.points

    def hook_points(self) -> HookPointInfo:
        """Every hook point: name -> (shape, dtype). ``rich.print`` shows it as a table."""
        sizes = {axis: str(size) for axis, size in axis_sizes(self._engine.manifest.config).items()}
        info = HookPointInfo()
        entries = self._engine.hooks(self._plan())
        for name in self._names():
            info[name] = (f"[{', '.join(sizes.get(axis, axis) for axis in entries[name].axes)}]", entries[name].dtype)
        return info

    def _names(self) -> list[str]:
        return self._engine.names(self._plan())

    def __repr__(self) -> str:
        cfg = self._engine.manifest.config
        return (
            f"{type(self).__name__}({cfg.model_name!r}: {cfg.n_layers} layers, {cfg.n_heads} heads, d_model {cfg.d_model}, "
            f"{len(self._names())} hook points)"
        )

    # Flags

    def _set_flag(self, flag: str, on: bool) -> None:
        others = {"use_attn_in": "use_split_qkv_input", "use_split_qkv_input": "use_attn_in"}
        if on and others.get(flag) in self._flags:
            raise InputError(
                f"{flag} and {others[flag]} exclude each other: call model.set_{others[flag]}(False) first."
            )
        (self._flags.add if on else self._flags.discard)(flag)

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether each head's output ``attn.hook_result`` [b, p, head, d_model] is a hook point."""
        self._set_flag("use_attn_result", use_attn_result)

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Whether each head reads a residual of its own for q, k and v: ``hook_{q,k,v}_input`` [b, p, head, d_model]."""
        self._set_flag("use_split_qkv_input", use_split_qkv_input)

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Whether each head reads a residual of its own: ``hook_attn_in`` [b, p, head, d_model]."""
        self._set_flag("use_attn_in", use_attn_in)

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Whether the residual that the MLP reads is a hook point: ``hook_mlp_in`` [b, p, d_model]."""
        self._set_flag("use_hook_mlp_in", use_hook_mlp_in)

    def set_use_hook_tokens(self, use_hook_tokens: bool) -> None:
        """Whether the tokens that are embedded are a hook point: ``hook_tokens`` int64 [b, p]."""
        self._set_flag("use_hook_tokens", use_hook_tokens)

    # Hooks

    def add_hook(
        self,
        name: HookName,
        hook: HookFunction,
        dir: str = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Adds a hook, for every thread, until ``reset_hooks``. ``name`` may be a function name -> bool; ``prepend`` lets
        it run before the others; a function is asked for our names, not for TransformerLens 4's. ``level`` is a number
        that ``reset_hooks(level=)`` picks it by; it also goes with a ``with model.hooks`` block of that depth (from 1).

        ``dir="bwd"`` adds a backward hook: see ``hooks``. Raises UnknownHookPoint.
        """
        self._hooks.add(name, hook, dir, is_permanent, prepend, level)

    def add_perma_hook(self, name: HookName, hook: HookFunction, dir: str = "fwd") -> None:
        """Adds a hook that ``reset_hooks`` leaves, unless told ``including_permanent=True``."""
        self._hooks.add(name, hook, dir, permanent=True)

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: str = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Removes added hooks and those of this thread's ``with model.hooks`` blocks, and empties every ``hook.ctx``.

        ``level`` removes those of one level only: that of ``add_hook``, or the depth of a block, from 1. The end of a
        block puts back the hooks of the blocks around it.
        """
        self._hooks.reset(including_permanent, level, dir=direction)
        if clear_contexts:
            self.clear_contexts()

    def clear_contexts(self) -> None:
        """Empties every ``hook.ctx``."""
        self._hooks.clear_contexts()

    @contextlib.contextmanager
    def hooks(
        self,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Self]:
        """Adds hooks to every call inside the ``with`` block; ``clear_contexts`` empties each ``hook.ctx`` after it.

        They are active in the thread (or asyncio task) that entered the block, so threads can share a model; a thread
        started inside the block has to enter one of its own. With ``reset_hooks_end=False`` they stay, as if added.

        ``bwd_hooks`` are called as ``function(gradient, hook=HookPoint)`` when gradients come by: what they return (an array
        or a tuple of one) replaces the gradient for all that is computed from it. Gradients come by in ``gradients``, in a
        forward whose result is a mean loss (``return_type="loss"``), and on the torch face in ``backward()``.
        """
        with contextlib.ExitStack() as stack:
            if reset_hooks_end:
                stack.enter_context(self._hooks.adding(fwd_hooks, bwd_hooks))
            else:
                for direction, some in (("fwd", fwd_hooks), ("bwd", bwd_hooks)):
                    for name, function in some:
                        self._hooks.add(name, function, direction)
            if clear_contexts:
                stack.callback(self._hooks.clear_contexts)
            yield self

    # Running

    def _execute(self, request: Request, fetch: Sequence[str], output: bool) -> tuple[Array | None, dict[str, Array]]:
        """Runs a request with the active hooks: (logits or residual, activations), the cache extended."""
        names: Collection[str] = set(self._engine.names(request.plan))
        callbacks = self._hooks.callbacks(self._to_user, self._from_user, names)
        batch, new = request.shape
        start = 0 if request.cache is None else request.cache.length
        prompt = new if not start else request.cache.prompt  # type: ignore[union-attr]
        plan, edits = self._edits(request.plan, Window(batch, start, new, start + new, prompt))
        results = self._engine.run(request.feeds, fetch, callbacks, output, plan, edits)
        if request.cache is not None:
            mask = np.ones(request.shape, np.int64) if request.mask is None else request.mask
            request.cache.extend(results.present, mask, self._identity)
        return results.output, results.values

    def _run(
        self,
        names_filter: Any,
        incl_bwd: bool,
        input: TokensOrText,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        *forward_args: Any,
        **forward_options: Any,
    ) -> tuple[Any, dict[str, Array], Request]:
        """Runs forward, whose arguments follow ``incl_bwd``; ``names_filter`` is False to cache nothing."""
        if return_type not in RETURN_TYPES:
            raise InputError(f"return_type must be one of {RETURN_TYPES}, not {return_type!r}.")
        request = self._request(input, *forward_args, **forward_options)
        stops = request.plan.stop is not None
        wants_loss = return_type in ("loss", "both") and not stops
        if wants_loss and request.tokens is None:
            raise InputError("a loss needs the tokens: with start_at_layer pass them as tokens=.")
        if wants_loss and request.shape[1] < 2:
            raise InputError("a loss needs at least 2 tokens: it is that of each next token.")
        fetch: list[str] = []
        if names_filter is not False:
            fetch = self._select(names_filter, request)
        scalar = return_type == "loss" and wants_loss and not loss_per_token
        if incl_bwd and not scalar:
            raise InputError(
                "incl_bwd runs backward from a scalar: pass return_type='loss' (without loss_per_token), or take "
                "model.gradients(tokens, metric)."
            )
        output: Array | None
        if incl_bwd or (scalar and self._backward_now()):
            output, values = self._execute_loss(request, fetch, fetch if incl_bwd else [])
        else:
            output, values = self._execute(request, fetch, output=stops or return_type is not None)
        if output is None:
            return None, values, request
        result = self._output_to_user(output, request)
        if stops or return_type == "logits":
            return result, values, request
        loss = self._loss_to_user(result, output, request, loss_per_token)
        return loss if return_type == "loss" else Output(result, loss), values, request

    def _loss_to_user(self, result: Any, output: Array, request: Request, per_token: bool) -> Any:
        return self._to_user(numerics.lm_cross_entropy_loss(output, request.tokens, request.mask, per_token=per_token))

    def _select(self, names_filter: NamesFilter, request: Request) -> list[str]:
        layers = self._engine.manifest.config.n_layers
        passed = self._engine.names(request.plan)
        if isinstance(names_filter, (str, list, tuple)):
            asked = select(self._names(), names_filter, layers)
            left_out = [name for name in asked if name not in set(passed)]
            if left_out:
                raise InputError(
                    f"{left_out[0]!r} is not computed in this run: start_at_layer or stop_at_layer leaves it out."
                )
            return asked
        return select(passed, names_filter, layers) if passed else []

    def forward(
        self,
        input: TokensOrText,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        start_at_layer: int | None = None,
        tokens: Any = None,
        shortformer_pos_embed: None = None,
        attention_mask: Any = None,
        stop_at_layer: int | None = None,
        past_kv_cache: KeyValueCache | None = None,
    ) -> Any:
        """Runs the model with the active hooks.

        Text beyond n_ctx is cut, with a UserWarning; token ids that long are an error.
        ``return_type``: "logits" [b, p, V]; "loss", the mean next-token cross-entropy in nats (``loss_per_token``:
        [b, p-1]); "both", a pair with names (``.logits``, ``.loss``); None, which runs for the hooks alone.
        ``start_at_layer`` takes the residual stream [b, p, d_model] before that block as ``input`` (``tokens`` may come
        along for the loss); ``stop_at_layer`` returns the residual before that block. Blocks left out are not run.
        ``attention_mask`` int [b, p] is 1 at real tokens, 0 at padding; positions count real tokens only.
        ``past_kv_cache`` is read and extended; padding on either side is then masked: exactly that of text, and of ids
        the PADs that end (``padding_side`` "left": begin) a row, unless there is an ``attention_mask``.
        ``shortformer_pos_embed`` holds TransformerLens's place. Raises InputError for unusable input, HookResultError,
        and whatever a hook raised.
        """
        return self._run(
            False,
            False,
            input,
            return_type,
            loss_per_token,
            prepend_bos,
            padding_side,
            start_at_layer,
            tokens,
            shortformer_pos_embed,
            attention_mask,
            stop_at_layer,
            past_kv_cache,
        )[0]

    __call__ = forward

    def loss_fn(self, logits: Any, tokens: Any, attention_mask: Any = None, per_token: bool = False) -> Any:
        """The next-token loss of logits [b, p, V]: forward's own (see utils.lm_cross_entropy_loss)."""
        return numerics.lm_cross_entropy_loss(logits, tokens, attention_mask, per_token)

    def run_with_cache(
        self,
        input: TokensOrText,
        *forward_args: Any,
        names_filter: NamesFilter = None,
        device: Any = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Any = None,
        return_cache_object: bool = True,
        **forward_options: Any,
    ) -> tuple[Any, Any]:
        """Runs the model and returns (output, ActivationCache). All but the arguments here are forward's.

        ``names_filter``: a hook name, a list of names, or a function name -> bool, which sees our names alone; None
        caches everything. ``pos_slice`` (an int, slice, array or Slice) keeps those positions of each activation,
        queries of scores and patterns; an int keeps an axis of 1, and Slice(int) drops it. Values are those after any
        active hook. ``incl_bwd`` (with ``return_type="loss"``) also runs backward from the loss, and keeps each gradient as
        ``<name>_grad``, after any backward hook. Raises UnknownHookPoint for a name or filter that matches nothing,
        InputError for ``incl_bwd`` without a scalar and for another ``device``.
        """
        if device is not None and str(device).partition(":")[0] != self.cfg.device:
            raise InputError(f"this model runs on {self.cfg.device}; its activations cannot be put on {device}.")
        output, values, request = self._run(names_filter, incl_bwd, input, *forward_args, **forward_options)
        if pos_slice is not None:
            entries = self._engine.hooks(request.plan)
            values = {
                name: of_positions(array, entries[name.removesuffix("_grad")].axes, pos_slice)
                for name, array in values.items()
            }
        if clear_contexts:
            self._hooks.clear_contexts()
        cache = ActivationCache({name: self._to_user(array) for name, array in values.items()}, self)
        if remove_batch_dim:
            cache.remove_batch_dim()
        return output, (cache if return_cache_object else cache.cache_dict)

    def run_with_hooks(
        self,
        input: TokensOrText,
        *forward_args: Any,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **forward_options: Any,
    ) -> Any:
        """Runs the model with ``fwd_hooks`` [(hook name | name -> bool, function)] added for this run. All but the arguments
        here are forward's.

        A function is called as ``function(activation, hook=HookPoint)``; what it returns replaces the activation, None
        keeps it, edits in place count. ``bwd_hooks`` (see ``hooks``) need ``return_type="loss"`` here, since arrays have no
        ``backward()``; tensors have. Raises UnknownHookPoint, HookResultError, and whatever a hook raises.
        """
        given = dict(zip(("return_type", "loss_per_token"), forward_args, strict=False)) | forward_options
        scalar = given.get("return_type") == "loss" and not given.get("loss_per_token")
        if bwd_hooks and not self._backward_later and (not scalar or given.get("stop_at_layer") is not None):
            raise InputError(
                "bwd_hooks would never fire: pass return_type='loss' (one number, of a whole run), whose gradients then come "
                "by, or use model.gradients(tokens, metric) inside model.hooks(bwd_hooks=...)."
            )
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self.forward(input, *forward_args, **forward_options)
