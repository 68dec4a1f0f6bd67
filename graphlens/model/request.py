"""What a call to a model asks for: its arguments, checked, as a plan of the graph to run and the feeds to run it on."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from graphlens.engine.plan import Plan
from graphlens.errors import InputError
from graphlens.model.kv_cache import KeyValueCache
from graphlens.model.text import TextMethods, TokensOrText

Array = npt.NDArray[Any]
RETURN_TYPES = ("logits", "loss", "both", None)


class Output(NamedTuple):
    """What ``return_type="both"`` gives: logits [b, p, V] and the loss, a scalar or [b, p-1]."""

    logits: Any
    loss: Any


@dataclass(frozen=True)
class Request:
    """One run: its plan and feeds, the tokens int64 [b, p] (None when it starts from a residual without any), the mask
    int64 [b, p] that was given or inferred, and the cache to extend."""

    plan: Plan
    feeds: dict[str, Any]
    tokens: npt.NDArray[np.int64] | None
    mask: npt.NDArray[np.int64] | None
    cache: KeyValueCache | None
    shape: tuple[int, int]


class RequestMethods(TextMethods):
    """The part of HookedTransformer that reads the arguments of forward."""

    @functools.cached_property
    def _identity(self) -> str:
        """Which model this is, whatever it is called: a digest of its file, which names its weights by their own
        digests and how they were processed."""
        return hashlib.sha256(self._engine.path.read_bytes()).hexdigest()

    def _request(
        self,
        input: TokensOrText,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        start_at_layer: int | None = None,
        tokens: Any = None,
        shortformer_pos_embed: None = None,
        attention_mask: Any = None,
        stop_at_layer: int | None = None,
        past_kv_cache: KeyValueCache | None = None,
    ) -> Request:
        if shortformer_pos_embed is not None:
            raise InputError("shortformer_pos_embed: no supported model adds its position embeddings to the attention.")
        cfg, cached = self._engine.manifest.config, past_kv_cache is not None
        start = self._layer("start_at_layer", start_at_layer)
        stop = self._layer("stop_at_layer", stop_at_layer)
        ids: npt.NDArray[np.int64] | None
        feeds: dict[str, Any]
        if start is None:
            ids, mask = self._tokens_and_mask(input, prepend_bos, padding_side, cached)
            feeds, shape = {"input_ids": ids}, (ids.shape[0], ids.shape[1])
        else:
            residual = self._residual(input)
            shape = (residual.shape[0], residual.shape[1])
            ids = mask = None
            if tokens is not None:
                ids, mask = self._tokens_and_mask(tokens, prepend_bos, padding_side, cached)
            if ids is not None and ids.shape != shape:
                raise InputError(f"tokens have shape {list(ids.shape)}; the residual has {list(shape)} positions.")
            feeds = {"residual": residual}
        if attention_mask is not None:
            mask = self._checked_mask(attention_mask, shape, cached)
        plan = Plan(tuple(sorted(self._flags)), start, stop, past=cached)
        if past_kv_cache is not None:
            if not isinstance(past_kv_cache, KeyValueCache):
                raise InputError(
                    "past_kv_cache must be graphlens's (KeyValueCache.init_cache(model.cfg, batch_size=...)), not a "
                    f"{type(past_kv_cache).__name__} of {type(past_kv_cache).__module__.partition('.')[0]}."
                )
            past_kv_cache.check(cfg, *shape, self._identity)
            whole = np.ones(shape, np.int64) if mask is None else mask
            layers = range(start or 0, cfg.n_layers if stop is None else stop)
            feeds |= past_kv_cache.feeds(layers, whole)
        elif mask is not None:
            feeds["attention_mask"] = mask
        return Request(plan, feeds, ids, mask, past_kv_cache, shape)

    def _layer(self, argument: str, layer: int | None) -> int | None:
        """A layer counted from the start. Raises InputError for one that the model has not."""
        if layer is None:
            return None
        count = self._engine.manifest.config.n_layers
        index = int(layer) + count if layer < 0 else int(layer)
        if not 0 <= index <= count:
            raise InputError(
                f"{argument}={layer}: this model has {count} layers (0-{count - 1}); {count} is their end."
            )
        return index

    def _residual(self, input: Any) -> Array:
        cfg = self._engine.manifest.config
        try:
            residual = self._from_user(input)
        except TypeError as error:
            raise InputError(
                f"with start_at_layer the input is the residual stream there, an array [batch, pos, {cfg.d_model}], not "
                f"{type(input).__name__}."
            ) from error
        if residual.ndim != 3 or residual.shape[2] != cfg.d_model or 0 in residual.shape:
            raise InputError(
                f"the residual has shape {list(residual.shape)}; this model's is [batch, pos, {cfg.d_model}] (d_model)."
            )
        if str(residual.dtype) != cfg.dtype:
            raise InputError(f"the residual is {residual.dtype}; this model computes in {cfg.dtype}. Cast it first.")
        if residual.shape[1] > cfg.n_ctx:
            raise InputError(f"{residual.shape[1]} positions, and {cfg.model_name} takes at most {cfg.n_ctx} (n_ctx).")
        return residual

    @staticmethod
    def _checked_mask(attention_mask: Any, shape: tuple[int, int], cached: bool = False) -> npt.NDArray[np.int64]:
        """The mask as int64 [b, p]. With a KV cache (``cached``) a row may be all padding: others of it are elsewhere."""
        mask = np.atleast_2d(np.asarray(attention_mask))
        if mask.shape != shape:
            raise InputError(f"attention_mask has shape {list(mask.shape)}; the tokens have {list(shape)}.")
        if not np.isin(mask, (0, 1)).all():
            raise InputError("attention_mask must hold 1 at real tokens and 0 at padding, and nothing else.")
        if not cached and not mask.any(-1).all():
            row = int(np.flatnonzero(~mask.any(-1))[0])
            raise InputError(f"attention_mask is 0 everywhere in row {row}: there is nothing to attend to.")
        return mask.astype(np.int64)
