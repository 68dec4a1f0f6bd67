"""A model's defaults for text, and other ones for the length of a ``with`` block. No torch needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

from graphlens.analysis.arrays import ArrayT
from graphlens.errors import InputError, is_one_of

if TYPE_CHECKING:
    from graphlens.model.hooked_transformer import HookedTransformer

DefaultT = TypeVar("DefaultT")
# What an argument says that leaves a default as it is.
USE_DEFAULT_VALUE = None


def override_or_use_default_value(default_flag: DefaultT, override: DefaultT | None = None) -> DefaultT:
    """What was asked for, or the default where nothing was.

    Args:
        default_flag: The default.
        override: What was asked for; None for nothing.

    Returns:
        ``override``, unless it is None: then ``default_flag``.
    """
    return default_flag if override is None else override


class LocallyOverridenDefaults(Generic[ArrayT]):
    """Other defaults for a model's text inside a ``with`` block (TransformerLens's name, with its spelling).

    Args:
        model: The model.
        **overrides: ``prepend_bos`` (True or False) and ``padding_side`` ("left" or "right"); None keeps the model's.

    Raises:
        InputError: For another default, or another value of one.
    """

    def __init__(self, model: HookedTransformer[ArrayT], **overrides: bool | str | None) -> None:
        allowed = {"prepend_bos": "True, False", "padding_side": "'left', 'right'"}
        for name, value in overrides.items():
            if name not in allowed:
                raise InputError(f"{name!r} is no default of a model's text: there is {' and '.join(allowed)}.")
            words = name == "padding_side" and is_one_of(value, ("left", "right"))
            if value is not None and not words and not (name == "prepend_bos" and isinstance(value, bool)):
                raise InputError(f"{name} must be {allowed[name]} or None, not {value!r}.")
        self.model = model
        self.overrides = overrides
        self._active: AbstractContextManager[None] | None = None

    @contextmanager
    def _overriding(self) -> Iterator[None]:
        text = self.model.runner.text
        bos, side = text.default_prepend_bos, text.default_padding_side
        asked, asked_side = self.overrides.get("prepend_bos"), self.overrides.get("padding_side")
        text.default_prepend_bos = bos if asked is None else bool(asked)
        if text.tokenizer is not None and asked_side is not None:
            text.default_padding_side = str(asked_side)
        try:
            yield
        finally:
            text.default_prepend_bos = bos
            if text.default_padding_side != side:
                text.default_padding_side = side

    def __enter__(self) -> None:
        self._active = self._overriding()
        self._active.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active is not None:
            self._active.__exit__(kind, error, trace)
            self._active = None
