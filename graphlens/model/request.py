"""What a call to a model asks for: its arguments, checked, as a plan of the graph to run and the feeds to run it on."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypedDict, cast

import numpy as np

from graphlens.analysis.arrays import Array, ArrayInput, ArrayT, UserArray, as_array
from graphlens.edits.gate import Window
from graphlens.engine.plan import Plan
from graphlens.errors import InputError, called, checked_number
from graphlens.file.io_names import ATTENTION_MASK, INPUT_IDS, RESIDUAL_IN
from graphlens.file.names import in_block, split_name
from graphlens.model.kv_cache import KeyValueCache
from graphlens.model.limits import longest
from graphlens.model.text import Input, Text, Tokens, is_text
from graphlens.runtime.types import DeviceValue

if TYPE_CHECKING:
    from graphlens.engine.engine import Engine

RETURN_TYPES = ("logits", "loss", "both", None)


class Output(NamedTuple, Generic[ArrayT]):
    """What ``return_type="both"`` gives.

    Attributes:
        logits: [b, p, V].
        loss: A scalar, or [b, p-1] with ``loss_per_token``.
    """

    logits: ArrayT
    loss: ArrayT


class Extended(Protocol):
    """Keys and values that a run adds to: a KeyValueCache, or a block's entry of one."""

    def extend(self, present: dict[str, DeviceValue], mask: Tokens, owner: str = "") -> None:
        """Takes over what a run returned; see ``KeyValueCache.extend``."""


class ForwardOptions(TypedDict, Generic[ArrayT], total=False):
    """The arguments of ``forward`` after ``return_type`` and ``loss_per_token``; see there."""

    prepend_bos: bool | None
    padding_side: str | None
    start_at_layer: int | None
    tokens: Input[ArrayT] | None
    shortformer_pos_embed: ArrayInput | UserArray | None
    attention_mask: ArrayInput | UserArray | None
    stop_at_layer: int | None
    past_kv_cache: KeyValueCache | None


OUTPUT_ARGUMENTS = ("return_type", "loss_per_token")  # of ``forward``, before the others
FORWARD_ARGUMENTS = tuple(ForwardOptions.__annotations__)


def check_arguments(given: Sequence[Any], options: Mapping[str, Any], more: Sequence[str] = ()) -> None:
    """Checks what a call hands on to ``forward``, so that an error names the function that the user called.

    Args:
        given: The arguments of ``forward`` after ``loss_per_token``.
        options: The same by name.
        more: Other names that there may be among ``options``.

    Raises:
        TypeError: For an argument that ``forward`` does not have, or is given twice.
    """
    known = {*FORWARD_ARGUMENTS[len(given) :], *more}
    if len(given) <= len(FORWARD_ARGUMENTS) and options.keys() <= known:
        return
    function, own = called()
    possible = list(dict.fromkeys([*(name for name in own if name != "self"), *more, *FORWARD_ARGUMENTS]))
    if len(given) > len(FORWARD_ARGUMENTS):
        raise TypeError(f"{function}() was given too many arguments; they are {', '.join(possible)}.")
    name = next(name for name in options if name not in known)
    if name in FORWARD_ARGUMENTS:
        raise TypeError(f"{function}() was given {name} twice: by its place and by its name.")
    near = difflib.get_close_matches(name, possible, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(possible)}."
    raise TypeError(f"{function}() has no argument {name!r}: {hint}")


@dataclass(frozen=True)
class Request:
    """One run.

    Attributes:
        plan: The kind of graph it needs, without what is active.
        feeds: The inputs of the graph.
        tokens: int64 [b, p]; None where the run starts from a residual stream and no tokens were given.
        mask: int64 [b, p], 1 at real tokens, as it was given or inferred; None where nothing is masked.
        real: The same, also where the padding needs no mask: that of text on the right. None where none is known of.
        cache: What of a KV cache it extends, if any.
        owner: The model that the cache belongs to from now on.
        shape: (b, p).
        window: Where the tokens lie in their sequences, for edits by position.
        bare: True if no activation is read, and of the logits only those of the last position.
        alone: True for a part of the model that is called by itself: hooks and interventions elsewhere are none of its own.
    """

    plan: Plan
    feeds: Mapping[str, Any]
    tokens: Tokens | None
    mask: Tokens | None
    real: Tokens | None
    cache: Extended | None
    owner: str
    shape: tuple[int, int]
    window: Window
    bare: bool = False
    alone: bool = False

    def repeated(self, times: int) -> Request:
        """The run of several copies of its prompts, one below the other.

        Args:
            times: How many.

        Returns:
            A run over whole prompts, with as many times the rows.
        """
        batch, length = self.shape[0] * times, self.shape[1]

        def tiled(array: Tokens | None) -> Tokens | None:
            return None if array is None else np.concatenate([array] * times)

        feeds = {name: np.concatenate([array] * times) for name, array in self.feeds.items()}
        window = Window.whole(batch, length)
        return replace(
            self,
            feeds=feeds,
            tokens=tiled(self.tokens),
            mask=tiled(self.mask),
            real=tiled(self.real),
            shape=(batch, length),
            window=window,
        )

    def need_tokens(self) -> Tokens:
        """The tokens, for a loss.

        Raises:
            InputError: Where the run starts from a residual stream and no tokens were given.
        """
        if self.tokens is None:
            raise InputError("a loss needs the tokens: with start_at_layer pass them as tokens=.")
        return self.tokens


class Reader(Generic[ArrayT]):
    """Reads the arguments of ``forward`` into requests.

    Args:
        engine: The model's engine.
        text: Its tokens and text.
    """

    def __init__(self, engine: Engine, text: Text[ArrayT]) -> None:
        self._engine, self._text = engine, text

    @property
    def identity(self) -> str:
        """Which model this is, whatever it is called: see ``Engine``."""
        return self._engine.identity

    def request(self, base: Plan, input: Input[ArrayT], *forward_args: Any, **forward_options: Any) -> Request:
        """The request of a call of ``forward``.

        Args:
            base: The plan of whole runs: which flags are set, and which SAEs there are.
            input: See ``HookedTransformer.forward``.
            *forward_args: Its arguments after ``loss_per_token``.
            **forward_options: The same by name.

        Raises:
            InputError: For arguments that do not fit the model or each other.
            TypeError: For arguments that ``forward`` does not have.
        """
        check_arguments(forward_args, forward_options)
        return self._request(base, input, *forward_args, **forward_options)

    def _request(
        self,
        base: Plan,
        input: Input[ArrayT],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        start_at_layer: int | None = None,
        tokens: Input[ArrayT] | None = None,
        shortformer_pos_embed: ArrayInput | UserArray | None = None,
        attention_mask: ArrayInput | UserArray | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: KeyValueCache | None = None,
    ) -> Request:
        """``request``, its arguments being those of ``forward``."""
        cfg, cached = self._engine.manifest.config, past_kv_cache is not None
        start = self._layer("start_at_layer", start_at_layer)
        stop = self._layer("stop_at_layer", stop_at_layer)
        ids: Tokens | None
        feeds: dict[str, Any]
        if start is None:
            ids, mask, real = self._text.tokens_and_mask(input, prepend_bos, padding_side, cached)
            feeds, shape = {INPUT_IDS: ids}, (ids.shape[0], ids.shape[1])
        else:
            residual = self._residual(input)
            shape = (residual.shape[0], residual.shape[1])
            ids = mask = real = None
            if tokens is not None:
                ids, mask, real = self._text.tokens_and_mask(tokens, prepend_bos, padding_side, cached)
            if ids is not None and ids.shape != shape:
                raise InputError(f"tokens have shape {list(ids.shape)}; the residual has {list(shape)} positions.")
            feeds = {RESIDUAL_IN: residual}
        if attention_mask is not None:
            mask = checked_mask(attention_mask, shape, past_kv_cache)
            real = mask if real is None else mask & real
        if shortformer_pos_embed is not None:
            self._ensure_own_positions(shortformer_pos_embed, shape, cached or mask is not None)
        plan = replace(base, start=start, stop=stop, past=cached)
        if start is not None:
            _ensure_without_tokens(base, start)
        window = Window.whole(*shape)
        if past_kv_cache is not None:
            if not isinstance(past_kv_cache, KeyValueCache):
                raise InputError(
                    "past_kv_cache must be graphlens's (KeyValueCache.init_cache(model.cfg, batch_size=...)), not a "
                    f"{type(past_kv_cache).__name__} of {type(past_kv_cache).__module__.partition('.')[0]}."
                )
            past_kv_cache.check(cfg, *shape, self.identity)
            whole = np.ones(shape, np.int64) if mask is None else mask
            layers = range(start or 0, cfg.n_layers if stop is None else stop)
            feeds |= past_kv_cache.feeds(layers, whole)
            window = past_kv_cache.window(shape[1])
        elif mask is not None:
            feeds[ATTENTION_MASK] = mask
        owner = self.identity if cached else ""
        return Request(plan, feeds, ids, mask, real, past_kv_cache, owner, shape, window)

    def whole_prompts(self, base: Plan, input: Input[ArrayT], **forward_options: Any) -> Request:
        """A request over whole prompts, as sweeps and gradients take them.

        Texts of different lengths are padded on the left unless told otherwise, so that the last position is each one's
        last token. Whatever padding is known of is masked.

        Args:
            base: The plan of whole runs: which flags are set, and which SAEs there are.
            input: Text or tokens [b, p].
            **forward_options: The arguments of ``forward`` by name.

        Raises:
            InputError: For a run of some layers only, or with a KV cache; for an attention mask that counts padding as
                real; and what ``request`` raises.
        """
        said = forward_options.get("attention_mask") is not None or forward_options.get("padding_side") is not None
        if is_text(input) and not said:
            forward_options["padding_side"] = "left"
        request = self.request(base, input, **forward_options)
        if request.tokens is None or request.plan.stop is not None or request.cache is not None:
            raise InputError("a sweep runs whole prompts: without start_at_layer, stop_at_layer and past_kv_cache.")
        if request.real is None:
            return request
        if request.mask is not None and (request.mask > request.real).any():
            row = int(np.flatnonzero((request.mask > request.real).any(-1))[0])
            raise InputError(
                f"attention_mask is 1 at padding of text {row}: these texts are padded on the "
                f"{self._text.side(forward_options.get('padding_side'))}. Leave it out: the padding of text is known."
            )
        return replace(request, mask=request.real, feeds={**request.feeds, ATTENTION_MASK: request.real})

    def _layer(self, argument: str, layer: int | None) -> int | None:
        """A layer counted from the start. Raises InputError for one that the model has not."""
        if layer is None:
            return None
        count = self._engine.manifest.config.n_layers
        layer = checked_number(layer, argument)
        index = layer + count if layer < 0 else layer
        if not 0 <= index <= count:
            raise InputError(
                f"{argument}={layer}: this model has {count} layers (0-{count - 1}); {count} is their end."
            )
        return index

    def _ensure_own_positions(self, given: object, shape: tuple[int, int], shifted: bool) -> None:
        """Raises InputError for position embeddings other than those that the graph adds to queries and keys anyway.

        Args:
            given: The argument ``shortformer_pos_embed``.
            shape: The tokens' shape.
            shifted: True where positions do not simply count up from 0, by a mask or a KV cache.
        """
        weights = self._engine.weights
        if self._engine.manifest.config.positional_embedding_type != "shortformer":
            raise InputError("shortformer_pos_embed: this model adds no position embeddings to queries and keys.")
        own, values = weights["pos_embed.W_pos"][: shape[1]], as_array(cast(ArrayInput, given))
        fits = values.shape in (own.shape, (*shape, own.shape[1]))
        if shifted or not fits or not np.allclose(values, own, rtol=1e-3, atol=1e-5):
            raise InputError(
                "shortformer_pos_embed: the model adds its own position embeddings to queries and keys, at every "
                "start_at_layer. Leave it out; other ones are set with model.set_weights({'pos_embed.W_pos': ...})."
            )

    def _residual(self, input: object) -> Array:
        cfg = self._engine.manifest.config
        try:
            residual = self._text.border.from_user(input)
        except TypeError as error:
            raise InputError(
                f"with start_at_layer the input is the residual stream there, an array [batch, pos, {cfg.d_model}], not "
                f"{type(input).__name__}."
            ) from error
        if residual.ndim != 3 or residual.shape[2] != cfg.d_model or 0 in residual.shape:
            raise InputError(
                f"the residual has shape {list(residual.shape)}; this model's is [batch, pos, {cfg.d_model}] (d_model)."
            )
        stream = self._engine.manifest.hooks.get(
            in_block(0, "hook_resid_pre")
        )  # of an adopted model it may be another dtype than the logits
        dtype = cfg.dtype if stream is None else stream.dtype
        if str(residual.dtype) != dtype:
            raise InputError(f"the residual is {residual.dtype}; this model computes in {dtype}. Cast it first.")
        if residual.shape[1] > cfg.n_ctx:
            raise InputError(f"{residual.shape[1]} positions, and {longest(cfg)}.")
        return residual


def _ensure_without_tokens(plan: Plan, start: int) -> None:
    """Raises InputError for a run from a residual stream on, which sees no tokens, with an SAE that is left out at some."""
    for one in plan.saes:
        if one.excluded and (split_name(one.writes)[0] or 0) >= start:
            raise InputError(
                f"start_at_layer={start}: the SAE at {one.hook!r} is left out at some tokens (exclude_special_tokens), and this "
                "run reads none. Attach it without, or start from the tokens."
            )


def checked_mask(attention_mask: object, shape: tuple[int, int], cache: object = None) -> Tokens:
    """An attention mask as int64 [b, p].

    Args:
        attention_mask: What the user gave.
        shape: The tokens' shape.
        cache: The KV cache, or a layer's entry, if there is one. A row may then be all padding, since its real tokens may be
            in the cache. With a KV cache the mask may be that of all positions [b, past + p], as ``input_to_embed`` gives it.

    Returns:
        1 at real tokens, 0 at padding.

    Raises:
        InputError: For another shape, other values than 0 and 1, a row without a real token, and a mask of all positions
            that is not the cache's at those which the cache holds.
    """
    try:
        mask = np.atleast_2d(as_array(cast(ArrayInput, attention_mask)))
    except ValueError as error:
        raise InputError("attention_mask is ragged: its rows have different lengths.") from error
    past = cache.length if isinstance(cache, KeyValueCache) else 0
    if isinstance(cache, KeyValueCache) and past and mask.shape == (shape[0], past + shape[1]):
        if not np.array_equal(mask[:, :past], cache.mask):
            raise InputError(
                f"attention_mask is not the KV cache's at the {past} positions that the cache holds: those were run with "
                "past_kv_cache.previous_attention_mask. Pass the mask of the new tokens alone."
            )
        mask = mask[:, past:]
    if mask.shape != shape:
        raise InputError(f"attention_mask has shape {list(mask.shape)}; the tokens have {list(shape)}.")
    if not np.isin(mask, (0, 1)).all():
        raise InputError("attention_mask must hold 1 at real tokens and 0 at padding, and nothing else.")
    if cache is None and not mask.any(-1).all():
        row = int(np.flatnonzero(~mask.any(-1))[0])
        raise InputError(f"attention_mask is 0 everywhere in row {row}: there is nothing to attend to.")
    return mask.astype(np.int64)
