"""What a call to an encoder asks for: text between special tokens, its mask, and the types of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, TypedDict, cast

import numpy as np

from graphlens.analysis.arrays import ArrayInput, ArrayT, UserArray, as_array
from graphlens.edits.gate import Window
from graphlens.engine.plan import Plan
from graphlens.errors import InputError, called
from graphlens.file.io_names import ATTENTION_MASK, INPUT_IDS, TOKEN_TYPE_IDS
from graphlens.model.request import Reader, Request, checked_mask
from graphlens.model.text import Input, Text, Tokens, is_text

Numbers: TypeAlias = ArrayInput | UserArray | None


class EncoderOptions(TypedDict, total=False):
    """The arguments of an encoder's ``forward`` after ``return_type``; see HookedEncoder.forward."""

    token_type_ids: Numbers
    one_zero_attention_mask: Numbers
    attention_mask: Numbers


ENCODER_ARGUMENTS = ("token_type_ids", "one_zero_attention_mask")
_MASKS = ("one_zero_attention_mask", "attention_mask")


class EncoderText(Text[ArrayT]):
    """Text of an encoder: the tokenizer puts its special tokens around it ([CLS] and [SEP])."""

    def encode(self, text: str, prepend_bos: bool | None, truncate: bool) -> list[int]:
        """The ids of a text, between special tokens.

        Args:
            text: The text.
            prepend_bos: None: an encoder's special tokens are always there.
            truncate: True cuts what goes beyond n_ctx, and leaves the special token at the end.

        Raises:
            InputError: For a model without a tokenizer, and where ``prepend_bos`` is said.
        """
        if prepend_bos is not None:
            raise InputError(
                "prepend_bos: an encoder's tokenizer puts its own special tokens around a text. Leave it out, or pass ids."
            )
        ids = self.need_tokenizer().encode(text, add_special_tokens=True)
        return self.cut(ids, False) if truncate else ids

    def cut(self, ids: list[int], bos: bool) -> list[int]:
        """The ids of a text without what goes beyond n_ctx; the special token at the end stays.

        Args:
            ids: What ``encode`` gave.
            bos: Of decoders.
        """
        n_ctx = self._engine.manifest.config.n_ctx
        if len(ids) <= n_ctx:
            return ids
        end = self.need_tokenizer().encode("", add_special_tokens=True)[-1:]
        return [*ids[: n_ctx - 1], ids[-1]] if ids[-1:] == end else ids[:n_ctx]

    def with_mask(self, input: str | Sequence[str], truncate: bool) -> tuple[Tokens, Tokens]:
        """Texts as token ids, and which of them are real.

        Args:
            input: One text or several, the shorter ones padded.
            truncate: True cuts what goes beyond n_ctx.

        Returns:
            Two int64 [b, p].

        Raises:
            InputError: For a model without a tokenizer, and different lengths without a PAD token.
        """
        rows, side = self._rows(input, None, truncate), self.side(None)
        tokens, lengths = self._padded(rows, side), np.asarray([[len(row)] for row in rows])
        index = np.arange(tokens.shape[1])
        real = index >= index.size - lengths if side == "left" else index < lengths
        return tokens, real.astype(np.int64)


class EncoderReader(Reader[ArrayT]):
    """Reads the arguments of an encoder's ``forward`` into requests."""

    def request(self, base: Plan, input: Input[ArrayT], *given: object, **options: object) -> Request:
        """The request of a call of ``forward``.

        Args:
            base: The plan of whole runs: which flags are set, and which SAEs there are.
            input: See ``HookedEncoder.forward``.
            *given: Its arguments after ``return_type``.
            **options: The same by name; ``attention_mask`` is another name of ``one_zero_attention_mask``.

        Raises:
            InputError: For arguments that do not fit the model or each other.
            TypeError: For arguments that ``forward`` does not have.
        """
        named = dict(zip(ENCODER_ARGUMENTS, given, strict=False))
        unknown = [name for name in options if name not in (*ENCODER_ARGUMENTS, *_MASKS) or name in named]
        if unknown or len(given) > len(ENCODER_ARGUMENTS):
            what = repr(unknown[0]) if unknown else "that many"
            raise TypeError(
                f"{called()[0]}() does not take {what} here: of an encoder's run there is {', '.join(ENCODER_ARGUMENTS)}."
            )
        options = {**named, **{name: value for name, value in options.items() if value is not None}}
        if all(options.get(name) is not None for name in _MASKS):
            raise InputError("one_zero_attention_mask and attention_mask are one argument: pass one of them.")
        # The padding of text is known. Of ids nothing is guessed: TransformerLens too takes them all for real.
        side = None if is_text(input) else "right"
        tokens, mask, real = self._text.tokens_and_mask(input, None, side, followed=is_text(input))
        shape = (tokens.shape[0], tokens.shape[1])
        feeds: dict[str, Tokens] = {INPUT_IDS: tokens}
        asked = next((options[name] for name in _MASKS if options.get(name) is not None), None)
        if asked is not None:
            mask = checked_mask(asked, shape)
            real = mask if real is None else mask & real
        if mask is not None:
            feeds[ATTENTION_MASK] = mask
        if options.get("token_type_ids") is not None:
            feeds[TOKEN_TYPE_IDS] = self._types(options["token_type_ids"], shape)
        return Request(base, feeds, tokens, mask, real, None, "", shape, Window.whole(*shape))

    def whole_prompts(self, base: Plan, input: Input[ArrayT], **forward_options: object) -> Request:
        """A request over whole prompts: an encoder has no others.

        Args:
            base: The plan of whole runs: which flags are set, and which SAEs there are.
            input: Text or tokens [b, p].
            **forward_options: The arguments of ``forward`` by name.

        Raises:
            InputError: What ``request`` raises.
        """
        return self.request(base, input, **forward_options)

    def _types(self, given: object, shape: tuple[int, int]) -> Tokens:
        """The types of tokens as int64 [b, p]. Raises InputError for others than there are."""
        try:
            types = np.atleast_2d(as_array(cast(ArrayInput, given)))
        except ValueError as error:
            raise InputError("token_type_ids is ragged: its rows have different lengths.") from error
        if types.shape != shape:
            raise InputError(f"token_type_ids has shape {list(types.shape)}; the tokens have {list(shape)}.")
        count = self._engine.manifest.config.n_token_types or 1
        if types.dtype.kind not in "iub" or types.min() < 0 or types.max() >= count:
            raise InputError(
                f"token_type_ids must hold whole numbers from 0 to {count - 1}: this model has {count} types."
            )
        return types.astype(np.int64)
