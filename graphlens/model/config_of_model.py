"""A configuration that follows a model: what is live of it is read from the model, and what is set on it is set there."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, Self, TypeAlias

from graphlens.errors import InputError, checked_number, warn
from graphlens.file.manifest import Manifest
from graphlens.file.model_config import ModelConfig
from graphlens.file.tokenizer import Tokenizer

Value: TypeAlias = Any  # of a field


class _Flags(Protocol):
    @property
    def names(self) -> tuple[str, ...]: ...


class _Text(Protocol):
    default_prepend_bos: bool
    default_padding_side: str
    tokenizer: Tokenizer | None


class _Engine(Protocol):
    manifest: Manifest


class Stated(Protocol):
    """What a configuration reads of a model, and sets: of its Runner."""

    @property
    def flags(self) -> _Flags:
        """The flags that are set."""

    @property
    def text(self) -> _Text:
        """Its defaults for text."""

    @property
    def engine(self) -> _Engine:
        """What the file says about itself."""

    @property
    def config(self) -> ModelConfig:
        """The architecture."""

    def set_flag(self, flag: str, on: bool) -> None:
        """Sets or unsets a flag."""


FLAGS = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in", "use_hook_tokens")
# The fields that say something and decide nothing: they can be set to anything, on a model too.
FREE = frozenset({
    "model_name", "seed", "init_mode", "initializer_range", "init_weights", "tokenizer_name", "from_checkpoint",
    "checkpoint_index", "checkpoint_label_type", "checkpoint_value", "n_params", "trust_remote_code",
    "uses_rms_norm", "layer_norm_folding", "quantization_method", "decoder_start_token_id", "tie_word_embeddings",
    "relative_attention_max_distance", "relative_attention_num_buckets", "n_devices",
})  # fmt: skip
_OF_TEXT = ("default_prepend_bos", "default_padding_side")
_PLAIN = (int, float, str, bool, type(None), list, tuple)
_INSTEAD = {
    "n_ctx": "Open it with from_onnx(..., n_ctx=) or from_pretrained(..., n_ctx=).",
    "dtype": "Open it with from_pretrained(..., dtype=).",
    "device": "Open it with from_pretrained(..., device=) or providers=.",
    "normalization_type": "model.process_weights_(fold_ln=True) folds the norms.",
    "tokenizer_prepends_bos": "It is the tokenizer's: model.set_tokenizer takes another one.",
}


def _normalization(stated: Stated) -> str | None:
    """TransformerLens's name of the norms, "LNPre" once they are folded, say."""
    manifest = stated.engine.manifest
    kind = manifest.config.normalization_type
    if not kind:
        return None
    return f"{kind}Pre" if "fold_ln" in manifest.processing and not kind.endswith("Pre") else kind


def _flag(name: str) -> Callable[[Stated], Value]:
    return lambda stated: name in stated.flags.names


# The fields that are read of the model whenever they are asked for.
LIVE: Mapping[str, Callable[[Stated], Value]] = {
    **{name: _flag(name) for name in FLAGS},
    "default_prepend_bos": lambda stated: stated.text.default_prepend_bos,
    "default_padding_side": lambda stated: stated.text.default_padding_side,
    "tokenizer_prepends_bos": lambda stated: (
        None if stated.text.tokenizer is None else stated.text.tokenizer.prepends_bos
    ),
    "normalization_type": _normalization,
    "processing": lambda stated: stated.engine.manifest.processing,
}


class FollowsModel:
    """The part of a configuration that knows the model it is of. It needs the fields of a dataclass."""

    __slots__ = ("__dict__", "__weakref__", "_model", "_views")
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def _stated(self) -> Stated | None:
        """The model that this is of, or else the last that was built from this; None while there is none."""
        found: Stated | None = None
        with contextlib.suppress(AttributeError):
            found = object.__getattribute__(self, "_model")()
        for view in reversed(self._followers() if found is None else []):
            found = found or view._stated()
        return found

    def _followers(self) -> list[FollowsModel]:
        """The configs of the models that were built from this one and are still there."""
        with contextlib.suppress(AttributeError):
            found = [reference() for reference in object.__getattribute__(self, "_views")]
            return [view for view in found if view is not None]
        return []

    def follow(self, stated: Stated) -> None:
        """Makes this the config of a model.

        Args:
            stated: The model's Runner; it is not kept alive.
        """
        object.__setattr__(self, "_model", weakref.ref(stated))

    def follows(self, stated: Stated) -> bool:
        """True if this is the config of that model.

        Args:
            stated: The part of a model that says what it is.
        """
        with contextlib.suppress(AttributeError):
            return object.__getattribute__(self, "_model")() is stated
        return False

    def lead(self, other: FollowsModel) -> None:
        """Sets on the config of a model that was built from this one what is set here later.

        Args:
            other: The config of that model; it is not kept alive.
        """
        own = self._stated()
        if own is None or not self.follows(own):  # the config of another model does not speak for this one
            views = tuple(weakref.ref(view) for view in (*self._followers(), other))
            object.__setattr__(self, "_views", views)

    def __getattribute__(self, name: str) -> Value:
        if name in LIVE:
            stated: Stated | None = object.__getattribute__(self, "_stated")()
            if stated is not None:
                return LIVE[name](stated)
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Value) -> None:
        if (stated := self._stated()) is not None:
            followers = [] if self.follows(stated) else self._followers()
            if followers and self._made_by(name) and not _equal(name, getattr(self, name), value):
                warn(
                    f"cfg.{name} is set on a config that models were built from: they stay as they are, each with a config of "
                    "its own (model.cfg), and this one is for the models that are built next."
                )
                object.__setattr__(self, "_views", ())
                followers = []
                stated = None
            for view in followers:
                setattr(view, name, value)
            if stated is not None and not followers and not self._set(stated, name, value):
                return
        object.__setattr__(self, name, value)

    def _made_by(self, name: str) -> bool:
        """True for a field that a model's graph is made by."""
        return name in type(self).__dataclass_fields__ and name not in FREE and name not in (*FLAGS, *_OF_TEXT)

    def _set(self, stated: Stated, name: str, value: Value) -> bool:
        """Sets a field of a model. True if it is to be noted here too."""
        if not self._made_by(name) and name not in (*FLAGS, *_OF_TEXT):
            return True
        if name in FLAGS:
            stated.set_flag(name, value)
        elif name == "default_prepend_bos":
            stated.text.default_prepend_bos = checked_number(value, name, bool)
        elif name == "default_padding_side":
            stated.text.default_padding_side = value
        else:
            now = getattr(self, name)
            if not _equal(name, now, value):
                raise InputError(
                    f"cfg.{name} is {now!r} and cannot become {value!r:.80}: this model's graph was made by it. "
                    f"{_INSTEAD.get(name, 'Build another model, with HookedTransformer(a config that has the other value).')}"
                )
        return False

    def told(self) -> dict[str, Value]:
        """What there is on this config: its fields and what else was set, as they are now."""
        return {name: getattr(self, name) for name in self.__dict__}

    def __copy__(self) -> Self:
        # Not of a model: it can be changed, and another model be built from it.
        made = object.__new__(type(self))
        made.__dict__.update(self.told())
        return made

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return _restored, (type(self), self.told())


def _equal(name: str, now: Value, value: Value) -> bool:
    """True if a field is set to what it is."""
    if name in ("device", "dtype"):
        return str(value).removeprefix("torch.") == str(now).removeprefix("torch.")
    return isinstance(value, _PLAIN) and bool(value == now)


def _restored(kind: type[FollowsModel], told: Mapping[str, Value]) -> FollowsModel:
    """A config that was pickled or copied deeply: of no model."""
    made = object.__new__(kind)
    made.__dict__.update(told)
    return made
