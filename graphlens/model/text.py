"""Tokens and text of a model: what a run is fed, with TransformerLens's BOS and padding rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeAlias, TypeGuard, cast

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import Array, ArrayInput, ArrayT, UserArray, as_array, is_tensor
from graphlens.errors import InputError, checked_number, warn
from graphlens.file.tokenizer_parts import checked_text
from graphlens.model.border import Border
from graphlens.model.held_tokenizer import HeldTokenizer
from graphlens.model.held_tokenizer import checked_side as checked_side
from graphlens.model.limits import longest

if TYPE_CHECKING:
    from graphlens.engine.engine import Engine
    from graphlens.file.tokenizer import Tokenizer

Tokens = npt.NDArray[np.int64]
_SHOWN = 20  # tokens in an error
# What a run takes: text, token ids as lists or arrays, or (with start_at_layer) a residual stream.
Input: TypeAlias = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Array | ArrayT


class Prompts(NamedTuple):
    """The tokens of a run.

    Attributes:
        tokens: int64 [b, p], every id inside the vocabulary, at most n_ctx of them.
        mask: int64 [b, p], 0 at padding; None where nothing has to be masked.
        real: The same wherever padding is known of, also where it needs no mask; None where it is known of nowhere.
    """

    tokens: Tokens
    mask: Tokens | None
    real: Tokens | None


class Text(HeldTokenizer, Generic[ArrayT]):
    """Turns what a user hands in into tokens, and tokens into text.

    Args:
        engine: The model's engine.
        border: How arrays cross to the user.
        tokenizer: The tokenizer; None for a model without one, which takes token ids only.
        default_prepend_bos: Whether text gets a BOS token where a call does not say.

    Attributes:
        default_prepend_bos: See above.
    """

    def __init__(
        self, engine: Engine, border: Border[ArrayT], tokenizer: Tokenizer | None, default_prepend_bos: bool
    ) -> None:
        super().__init__(engine, tokenizer)
        self.border = border
        self.default_prepend_bos = default_prepend_bos
        self._warned = False

    # Text

    def single_token(self, string: str) -> int:
        """The id of a string that is exactly one token.

        Args:
            string: The text, its leading space included.

        Raises:
            InputError: When it is none or several.
        """
        ids = self.need_tokenizer().encode(string, add_special_tokens=False)
        if len(ids) != 1:
            shown = f"{self.of_each(ids[:_SHOWN])}{', ...' if len(ids) > _SHOWN else ''}"
            raise InputError(f"{string!r:.200} is {len(ids)} tokens ({shown}), not one.")
        return ids[0]

    def encode(self, text: str, prepend_bos: bool | None, truncate: bool) -> list[int]:
        """The ids of a text.

        Args:
            text: The text.
            prepend_bos: Whether it gets a BOS token; None for the default.
            truncate: True cuts what goes beyond n_ctx.

        Raises:
            InputError: For a model without a tokenizer, and a tokenizer without BOS where it is asked for.
        """
        tokenizer = self.need_tokenizer()
        bos = self.default_prepend_bos if prepend_bos is None else checked_number(prepend_bos, "prepend_bos", bool)
        ids = [*([tokenizer.require_bos()] if bos else []), *tokenizer.encode(text, add_special_tokens=False)]
        return self.cut(ids, bos) if truncate else ids

    def cut(self, ids: list[int], bos: bool) -> list[int]:
        """The ids of a text without what goes beyond n_ctx, at the tokenizer's ``truncation_side``.

        Args:
            ids: What ``encode`` gave.
            bos: Whether they begin with a BOS token, which stays.
        """
        n_ctx, kept = self._engine.manifest.config.n_ctx, int(bos)
        if len(ids) <= n_ctx or self.need_tokenizer().truncation_side != "left":
            return ids[:n_ctx]
        return [*ids[:kept], *ids[len(ids) - n_ctx + kept :]]

    def of_each(self, ids: Sequence[int]) -> list[str]:
        """The text of each token.

        Args:
            ids: Token ids.

        Raises:
            InputError: For a model without a tokenizer.
        """
        tokenizer = self.need_tokenizer()
        return [tokenizer.decode([token]) for token in ids]

    def padded(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        truncate: bool = True,
        padding_side: str | None = None,
    ) -> Tokens:
        """Text as token ids, shorter prompts padded with PAD.

        Args:
            input: One text or several.
            prepend_bos: Whether each gets a BOS token; None for the default.
            truncate: True cuts what goes beyond n_ctx.
            padding_side: "right", "left", or None for the default.

        Returns:
            int64 [b, p].

        Raises:
            InputError: For a model without a tokenizer, and different lengths without a PAD token.
        """
        side = self.side(padding_side)
        return self._padded(self._rows(input, prepend_bos, truncate), side)

    def _rows(self, input: str | Sequence[str], prepend_bos: bool | None, truncate: bool) -> list[list[int]]:
        several = (
            isinstance(input, Iterable)
            and not isinstance(input, (str, bytes, Mapping))
            and getattr(input, "ndim", 1) > 0
        )
        texts = list(input) if several else [checked_text(input)]
        if not texts:
            raise InputError("the list of texts is empty: pass one text at least.")
        return [self.encode(text, prepend_bos, truncate) for text in texts]

    def _padded(self, rows: Sequence[Sequence[int]], side: str) -> Tokens:
        width, pad = max(map(len, rows)), self.need_tokenizer().pad_token_id
        if pad is None and any(len(row) < width for row in rows):
            raise InputError("prompts of different lengths need a PAD token, and this tokenizer has none.")
        fills = [[pad] * (width - len(row)) for row in rows]
        both = zip(rows, fills, strict=True)
        return np.asarray([[*fill, *row] if side == "left" else [*row, *fill] for row, fill in both], np.int64)

    # Tokens of a run

    def tokens_and_mask(
        self,
        input: Input[ArrayT],
        prepend_bos: bool | None,
        padding_side: str | None = None,
        followed: bool = False,
        truncate: bool = True,
    ) -> Prompts:
        """The tokens of a run, and which of them are real.

        Args:
            input: What a run takes.
            prepend_bos: Whether text gets a BOS token; None for the default.
            padding_side: "right", "left" or None for the default.
            followed: True where more tokens come after these later (a KV cache, generation). Padding on the right needs a
                mask only then: otherwise no real token comes after it, and causal attention never looks at it.
            truncate: True cuts text at n_ctx, with a warning. Ids are never cut.

        Returns:
            The tokens. The padding of text is known; that of ids is guessed, and only where it has to be masked.

        Raises:
            InputError: For input that is neither text nor ids, is empty or too long, or has ids outside the vocabulary.
        """
        side = self.side(padding_side)
        masked = side == "left" or followed
        if not is_text(input):
            tokens = self._validated(self.ids(input))
            guessed = self._guessed_mask(tokens, prepend_bos, side) if masked else None
            self._ensure_masked(guessed, side)
            return Prompts(tokens, guessed, guessed)
        rows = some(self._rows(input, prepend_bos, truncate=False))
        cfg = self._engine.manifest.config
        n_ctx = cfg.n_ctx
        cut = [str(len(row) - n_ctx) for row in rows if len(row) > n_ctx]
        if truncate and cut:
            end = "start" if self.need_tokenizer().truncation_side == "left" else "end"
            warn(f"{', '.join(cut)} tokens were cut from the {end} of the text: {longest(cfg)}.")
            bos = self.default_prepend_bos if prepend_bos is None else prepend_bos
            rows = [self.cut(row, bos) for row in rows]
        tokens = self._validated(self._padded(rows, side))
        lengths, index = np.asarray([[len(row)] for row in rows]), np.arange(tokens.shape[1])
        mask = index >= index.size - lengths if side == "left" else index < lengths
        real = None if mask.all() else mask.astype(np.int64)
        self._ensure_masked(real, side)
        return Prompts(tokens, real if masked else None, real)

    def _ensure_masked(self, real: Tokens | None, side: str) -> None:
        """Raises InputError for padding on the left that an adopted file computes with."""
        manifest = self._engine.manifest
        if side == "left" and real is not None and not real.all() and not manifest.masks_left_padding:
            raise InputError(
                f"{manifest.config.model_name} was adopted from a file that computes a prompt padded on the left as another than "
                "the same prompt alone: pass padding_side='right', or prompts of one length."
            )

    def warn_of_padding_in_loss(self) -> None:
        """Warns, the first time for a model, that a loss counts the padding of text."""
        if not self._warned:
            self._warned = True
            warn(
                "the texts have different lengths and are padded on the right, and this loss counts the padding, as "
                "TransformerLens's does. For the loss of the real tokens pass padding_side='left', or tokens with "
                "attention_mask=."
            )

    def _guessed_mask(self, tokens: Tokens, prepend_bos: bool | None, side: str) -> Tokens | None:
        """The mask that TransformerLens guesses from ids alone: 0 at the PADs that end a row (side "left": begin it).

        Where PAD and BOS are one id and prompts begin with BOS, the last PAD on the left is taken for BOS.
        """
        if self.tokenizer is None or self.tokenizer.pad_token_id is None:
            return None
        real = tokens != self.tokenizer.pad_token_id
        if side == "right":
            mask = np.logical_or.accumulate(real[:, ::-1], axis=1)[:, ::-1]
            return None if mask.all() else mask.astype(np.int64)
        mask = np.logical_or.accumulate(real, axis=1)
        bos = self.default_prepend_bos if prepend_bos is None else prepend_bos
        if bos and self.tokenizer.bos_token_id == self.tokenizer.pad_token_id:
            mask[:, :-1] |= mask[:, 1:].copy()
            mask[:, -1] = True
        return None if mask.all() else mask.astype(np.int64)

    def _validated(self, tokens: Array) -> Tokens:
        cfg = self._engine.manifest.config
        if tokens.size == 0:
            raise InputError("the input is empty: it holds no token.")
        _check_vocabulary(tokens, cfg.d_vocab)
        if tokens.shape[1] > cfg.n_ctx:
            raise InputError(f"{tokens.shape[1]} tokens, and {longest(cfg)}.")
        return tokens.astype(np.int64, copy=False)  # after the check: a large unsigned id would wrap around

    # Token ids

    def token_ids(self, input: ArrayInput | UserArray, decoding: bool = False) -> Tokens:
        """Token ids of any shape as int64.

        Args:
            input: One id, lists of them, or an array.
            decoding: True also allows ids that only the tokenizer knows (its vocabulary may be larger than the model's), and
                whole numbers of a floating dtype, as TransformerLens does there.

        Raises:
            InputError: For numbers that are no integers, and for ids outside the vocabulary.
        """
        ids = _whole(self._array(input)) if decoding else self._array(input)
        if ids.size and not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"tokens must be integers, not {ids.dtype}.")
        size = self._engine.manifest.config.d_vocab
        _check_vocabulary(ids, max(size, len(self.need_tokenizer())) if decoding else size)
        return ids.astype(np.int64, copy=False)

    def ids(self, input: Input[ArrayT], looking: bool = False) -> Array:
        """Token ids as integers [b, p] of whatever width.

        Args:
            input: Ids [b, p], or [p] for one row.
            looking: True also allows whole numbers of a floating dtype, as TransformerLens does where it looks for a token.

        Raises:
            InputError: For ragged lists, numbers that are no integers, and other shapes.
        """
        if isinstance(input, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in input):
            lengths = [len(row) if isinstance(row, (list, tuple)) else -1 for row in input]
            if len(set(lengths)) > 1:
                raise InputError(
                    f"ragged token lists (lengths {lengths}): pad them, or pass strings to have that done."
                )
        array = _whole(self._array(input)) if looking else self._array(input)
        if array.size and not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"tokens must be integers, not {array.dtype}.")
        if array.ndim not in (1, 2):
            raise InputError(f"tokens must have shape [batch, pos] or [pos], not {list(array.shape)}.")
        return np.atleast_2d(array)

    def _array(self, input: object) -> Array:
        try:
            return self.border.from_user(input)
        except TypeError:
            pass
        try:
            return as_array(cast(ArrayInput, input))
        except ValueError as error:
            if is_tensor(input):
                raise
            raise InputError("ragged token lists: pad them, or pass strings to have that done.") from error


def is_text(input: object) -> TypeGuard[str | Sequence[str]]:
    """True for a string and for a list of strings."""
    return isinstance(input, str) or (
        isinstance(input, (list, tuple)) and len(input) > 0 and all(isinstance(text, str) for text in input)
    )


def some(rows: list[list[int]]) -> list[list[int]]:
    """The rows as they are, if there is a token in any of them.

    Args:
        rows: The ids of each prompt.

    Raises:
        InputError: If there is none.
    """
    if not any(rows):
        raise InputError("the prompt is empty: it holds no token. Pass some text, or prepend_bos=True.")
    return rows


def _check_vocabulary(ids: Array, size: int) -> None:
    if ids.size:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            bad = low if low < 0 else high
            raise InputError(f"token id {bad} is outside the vocabulary: ids go from 0 to {size - 1}.")


def _whole(ids: Array) -> Array:
    """Ids of a floating dtype as integers, where all of them are whole numbers; others as they are."""
    if ids.dtype.kind != "f" or not np.isfinite(ids).all() or (ids != np.rint(ids)).any():
        return ids
    return ids.astype(np.int64) if not ids.size or np.abs(ids).max() < 2**62 else ids
