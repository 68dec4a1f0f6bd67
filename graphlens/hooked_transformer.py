"""The TransformerLens-shaped object over a hooked file. NumPy in and out; graphlens.torch has the same in tensors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from graphlens import hook_points
from graphlens.analysis import numerics
from graphlens.analysis.activation_cache import ActivationCache
from graphlens.engine import Engine
from graphlens.errors import InputError
from graphlens.hook_points import NamesFilter
from graphlens.hooks import HookPoint, HookRegistry, Hooks, hook_table
from graphlens.manifest import ModelConfig
from graphlens.runtime.providers import Providers
from graphlens.terminal import spinner
from graphlens.tokenizer import Tokenizer, load_tokenizer

Array = npt.NDArray[Any]
TokensOrText = Any
_RETURN_TYPES = ("logits", "loss", "both", None)


@dataclass(frozen=True)
class HookedTransformerConfig(ModelConfig):
    """The model's configuration under TransformerLens's attribute names: the file's architecture and this session's
    choices (``device`` is "cpu" or "cuda")."""

    device: str
    default_prepend_bos: bool
    tokenizer_prepends_bos: bool | None
    processing: tuple[str, ...]

    attn_only = False
    use_attn_result = False
    use_split_qkv_input = False
    use_attn_in = False
    use_hook_mlp_in = False
    use_hook_tokens = False


class HookPointInfo(dict[str, tuple[str, str]]):
    """Hook points of a model: name -> (shape, dtype). Printed by rich, it is a table."""

    title = "hook points"

    def __rich__(self) -> Any:
        return hook_table(self, f"{len(self)} {self.title}")


class HookedTransformer:
    """A hooked model: run it, read any activation, edit any activation.

    Made by ``from_pretrained``, ``from_pretrained_no_processing`` or ``from_onnx``. Tokens are integer arrays [b, p]
    or [p], nested lists, or strings; ``prepend_bos`` applies to strings only.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None = None, default_prepend_bos: bool = True) -> None:
        self._engine = engine
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(engine.folder)
        self._default_prepend_bos = default_prepend_bos
        self._hooks = HookRegistry(engine.hook_names, engine.manifest.config.n_layers)

    # Opening

    @classmethod
    def from_onnx(
        cls, path: str | os.PathLike[str], providers: Providers = None, default_prepend_bos: bool = True
    ) -> Self:
        """Opens a hooked folder or ``model.onnx``. Raises ModelFileError when it is damaged, altered or not hooked."""
        with spinner(f"Opening {path}"):
            return cls(Engine(path, providers), default_prepend_bos=default_prepend_bos)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        providers: Providers = None,
        default_prepend_bos: bool = True,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Opens a model by hub name, TransformerLens alias, checkpoint folder or hooked folder.

        The first time it is exported into the cache folder (``GRAPHLENS_CACHE``), which needs torch and transformers;
        afterwards it opens from there without them. Until weight processing exists, weights load unprocessed.
        ``cache_dir``, ``token`` and ``revision`` are huggingface_hub's. Raises ExportError, ModelFileError.
        """
        from graphlens.exporter import cached_export

        folder = cached_export(name, revision=revision, token=token, cache_dir=cache_dir)
        return cls.from_onnx(folder, providers, default_prepend_bos)

    @classmethod
    def from_pretrained_no_processing(cls, name: str | os.PathLike[str], **options: Any) -> Self:
        """``from_pretrained`` with the checkpoint's weights exactly as they are."""
        return cls.from_pretrained(name, **options)

    # Arrays at the border: the torch face overrides these

    def _to_user(self, array: Array) -> Any:
        return array

    def _from_user(self, value: Any) -> Array:
        if not isinstance(value, np.ndarray):
            raise TypeError(type(value).__name__)
        return value

    # Describing

    @cached_property
    def cfg(self) -> HookedTransformerConfig:
        """The configuration; see HookedTransformerConfig."""
        return HookedTransformerConfig(
            **asdict(self._engine.manifest.config),
            device="cuda" if self.providers[0].startswith("CUDA") else "cpu",
            default_prepend_bos=self._default_prepend_bos,
            tokenizer_prepends_bos=None if self.tokenizer is None else self.tokenizer.prepends_bos,
            processing=self._engine.manifest.processing,
        )

    @property
    def providers(self) -> list[str]:
        """The active execution providers, first choice first."""
        return self._engine.providers

    @property
    def hook_dict(self) -> Mapping[str, HookPoint]:
        """Every hook point by name, in firing order."""
        return self._hooks.points

    def hook_points(self) -> HookPointInfo:
        """Every hook point: name -> (shape, dtype). ``rich.print`` shows it as a table."""
        sizes = {axis: str(size) for axis, size in hook_points.axis_sizes(self._engine.manifest.config).items()}
        info = HookPointInfo()
        for name, entry in self._engine.manifest.hooks.items():
            info[name] = (f"[{', '.join(sizes.get(axis, axis) for axis in entry.axes)}]", entry.dtype)
        return info

    def __repr__(self) -> str:
        cfg = self._engine.manifest.config
        return (
            f"{type(self).__name__}({cfg.model_name!r}: {cfg.n_layers} layers, {cfg.n_heads} heads, d_model {cfg.d_model}, "
            f"{len(self._engine.hook_names)} hook points)"
        )

    # Tokens

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(f"{self._engine.folder} has no tokenizer: pass token ids, not text.")
        return self.tokenizer

    def _encode(self, text: str, prepend_bos: bool | None, truncate: bool) -> list[int]:
        tokenizer = self._need_tokenizer()
        bos = self._default_prepend_bos if prepend_bos is None else prepend_bos
        ids = [*([tokenizer.require_bos()] if bos else []), *tokenizer.encode(text)]
        return ids[: self._engine.manifest.config.n_ctx] if truncate else ids

    def _token_array(
        self, input: str | Sequence[str], prepend_bos: bool | None = None, truncate: bool = True
    ) -> npt.NDArray[np.int64]:
        """Text -> int64 [b, p], padded on the right with PAD."""
        texts = [input] if isinstance(input, str) else list(input)
        rows = [self._encode(text, prepend_bos, truncate) for text in texts]
        width = max((len(row) for row in rows), default=0)
        if width == 0:
            raise InputError("the prompt is empty: it holds no token. Pass some text, or prepend_bos=True.")
        pad = self._need_tokenizer().pad_token_id
        if pad is None and any(len(row) < width for row in rows):
            raise InputError("prompts of different lengths need a PAD token, and this tokenizer has none.")
        return np.asarray([[*row, *[pad] * (width - len(row))] for row in rows], np.int64)

    def to_tokens(self, input: str | Sequence[str], prepend_bos: bool | None = None, truncate: bool = True) -> Any:
        """Text -> token ids [b, p] (int64); one string gives b = 1. Shorter prompts are padded on the right.

        ``truncate`` cuts at n_ctx. Raises InputError for a prompt of no tokens, or a model without a tokenizer.
        """
        return self._to_user(self._token_array(input, prepend_bos, truncate))

    def to_string(self, tokens: Any) -> str | list[str]:
        """Token ids [p] -> text; [b, p] -> a list of texts."""
        array = np.asarray(tokens)
        tokenizer = self._need_tokenizer()
        if array.ndim == 2:
            return [tokenizer.decode(row) for row in array]
        return tokenizer.decode(np.atleast_1d(array).tolist())

    def to_str_tokens(self, input: Any, prepend_bos: bool | None = None) -> list[str] | list[list[str]]:
        """The text of each token: of a string or ids [p] -> a list; of a list of strings -> a list of lists."""
        if isinstance(input, str):
            ids: Sequence[int] = self._encode(input, prepend_bos, truncate=True)
            return self._str_tokens(ids)
        if isinstance(input, (list, tuple)) and input and isinstance(input[0], str):
            return [self._str_tokens(self._encode(text, prepend_bos, truncate=True)) for text in input]
        array = np.asarray(input)
        if array.ndim == 2 and array.shape[0] == 1:
            array = array[0]
        if array.ndim == 2:
            return [self._str_tokens(row) for row in array]
        return self._str_tokens(np.atleast_1d(array).tolist())

    def _str_tokens(self, ids: Sequence[int]) -> list[str]:
        tokenizer = self._need_tokenizer()
        return [tokenizer.decode([token]) for token in ids]

    def to_single_token(self, string: str) -> int:
        """The id of a string that is exactly one token. Raises InputError when it is none or several."""
        ids = self._need_tokenizer().encode(string)
        if len(ids) != 1:
            raise InputError(f"{string!r} is {len(ids)} tokens ({self._str_tokens(ids)}), not one.")
        return ids[0]

    # Running

    def _tokens(self, input: TokensOrText, prepend_bos: bool | None) -> npt.NDArray[np.int64]:
        cfg = self._engine.manifest.config
        if isinstance(input, str) or (
            isinstance(input, (list, tuple)) and len(input) > 0 and all(isinstance(text, str) for text in input)
        ):
            tokens = self._token_array(input, prepend_bos, truncate=False)
        else:
            tokens = self._ids(input)
        if tokens.size == 0:
            raise InputError("the input is empty: it holds no token.")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= cfg.d_vocab:
            bad = low if low < 0 else high
            raise InputError(f"token id {bad} is outside the vocabulary: ids go from 0 to {cfg.d_vocab - 1}.")
        if tokens.shape[1] > cfg.n_ctx:
            raise InputError(f"{tokens.shape[1]} tokens, and {cfg.model_name} takes at most {cfg.n_ctx} (n_ctx).")
        return tokens.astype(np.int64, copy=False)  # only now: a large unsigned id would wrap around

    @staticmethod
    def _ids(input: Any) -> npt.NDArray[Any]:
        if isinstance(input, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in input):
            lengths = [len(row) if isinstance(row, (list, tuple)) else -1 for row in input]
            if len(set(lengths)) > 1:
                raise InputError(
                    f"ragged token lists (lengths {lengths}): pad them, or pass strings to have that done."
                )
        try:
            array = np.asarray(input)
        except ValueError as error:
            raise InputError("ragged token lists: pad them, or pass strings to have that done.") from error
        if array.size and not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"tokens must be integers, not {array.dtype}.")
        if array.ndim not in (1, 2):
            raise InputError(f"tokens must have shape [batch, pos] or [pos], not {list(array.shape)}.")
        return np.atleast_2d(array)

    def _feeds(self, tokens: npt.NDArray[np.int64], attention_mask: Any) -> dict[str, Array]:
        feeds: dict[str, Array] = {"input_ids": tokens}
        if attention_mask is not None:
            mask = np.atleast_2d(np.asarray(attention_mask))
            if not np.isin(mask, (0, 1)).all():
                raise InputError("attention_mask must hold 1 at real tokens and 0 at padding, and nothing else.")
            if mask.shape != tokens.shape:
                raise InputError(f"attention_mask has shape {list(mask.shape)}; the tokens have {list(tokens.shape)}.")
            feeds["attention_mask"] = mask.astype(np.int64)
        return feeds

    def _run(
        self,
        input: TokensOrText,
        fetch: Sequence[str],
        return_type: str | None,
        prepend_bos: bool | None,
        attention_mask: Any,
    ) -> tuple[Any, dict[str, Any]]:
        if return_type not in _RETURN_TYPES:
            raise InputError(f"return_type must be one of {_RETURN_TYPES}, not {return_type!r}.")
        tokens = self._tokens(input, prepend_bos)
        if return_type in ("loss", "both") and tokens.shape[1] < 2:
            raise InputError("a loss needs at least 2 tokens: it is that of each next token.")
        callbacks = self._hooks.callbacks(self._to_user, self._from_user)
        logits, values = self._engine.run(
            self._feeds(tokens, attention_mask), fetch, callbacks, logits=return_type is not None
        )
        return self._output(logits, tokens, return_type), {name: self._to_user(array) for name, array in values.items()}

    def _output(self, logits: Array | None, tokens: npt.NDArray[np.int64], return_type: str | None) -> Any:
        if logits is None:
            return None
        if return_type == "logits":
            return self._to_user(logits)
        loss = self._to_user(numerics.next_token_loss(logits, tokens))
        return loss if return_type == "loss" else (self._to_user(logits), loss)

    def forward(
        self,
        input: TokensOrText,
        return_type: str | None = "logits",
        prepend_bos: bool | None = None,
        attention_mask: Any = None,
    ) -> Any:
        """Runs the model with the active hooks.

        ``return_type``: "logits" [b, p, V]; "loss", the mean next-token cross-entropy in nats; "both", a pair; None.
        ``attention_mask`` int [b, p] is 1 at real tokens, 0 at padding; positions count real tokens only.
        Raises InputError for unusable tokens, HookResultError and whatever a hook raised.
        """
        return self._run(input, (), return_type, prepend_bos, attention_mask)[0]

    __call__ = forward

    def run_with_cache(
        self,
        input: TokensOrText,
        names_filter: NamesFilter = None,
        remove_batch_dim: bool = False,
        return_cache_object: bool = True,
        return_type: str | None = "logits",
        prepend_bos: bool | None = None,
        attention_mask: Any = None,
    ) -> tuple[Any, Any]:
        """Runs the model and returns (output, ActivationCache).

        ``names_filter``: a hook name, a list of names, or a function name -> bool; None caches everything. Raises
        UnknownHookPoint for a name or filter that matches nothing. Values are those after any active hook.
        """
        names = hook_points.select(self._engine.hook_names, names_filter, self._engine.manifest.config.n_layers)
        output, values = self._run(input, names, return_type, prepend_bos, attention_mask)
        cache = ActivationCache(values, self)
        if remove_batch_dim:
            cache.remove_batch_dim()
        return output, (cache if return_cache_object else cache.cache_dict)

    def run_with_hooks(
        self,
        input: TokensOrText,
        fwd_hooks: Hooks = (),
        clear_contexts: bool = False,
        **forward_options: Any,
    ) -> Any:
        """Runs the model with ``fwd_hooks`` [(hook name | name -> bool, function)] added for this run.

        A function is called as ``function(activation, hook=HookPoint)``; what it returns replaces the activation, None
        keeps it, edits in place count. Raises UnknownHookPoint, HookResultError, and whatever a hook raises.
        """
        with self.hooks(fwd_hooks, clear_contexts=clear_contexts):
            return self.forward(input, **forward_options)

    @contextlib.contextmanager
    def hooks(self, fwd_hooks: Hooks = (), clear_contexts: bool = False) -> Iterator[Self]:
        """Adds hooks to every call inside the ``with`` block; ``clear_contexts`` empties each ``hook.ctx`` after it.

        They are active in the thread (or asyncio task) that entered the block, so threads can share a model; a thread
        started inside the block has to enter one of its own.
        """
        with self._hooks.adding(fwd_hooks):
            try:
                yield self
            finally:
                if clear_contexts:
                    self._hooks.clear_contexts()

    # The end of the model, on arrays

    def ln_final(self, residual: Any) -> Any:
        """The final norm applied to a residual stream [..., d_model]; same shape."""
        weights, config = self._engine.weights, self._engine.manifest.config
        return self._to_user(
            numerics.layer_norm(
                self._from_user(residual),
                weights.get("ln_final.w"),
                weights.get("ln_final.b"),
                config.eps,
                centre=config.normalization_type.startswith("LN"),
            )
        )

    def unembed(self, residual: Any) -> Any:
        """Logits [..., d_vocab] of a normalised residual [..., d_model] (after ``ln_final``)."""
        weights = self._engine.weights
        logits = self._from_user(residual) @ weights["unembed.W_U"]
        return self._to_user(logits + weights["unembed.b_U"] if "unembed.b_U" in weights else logits)
