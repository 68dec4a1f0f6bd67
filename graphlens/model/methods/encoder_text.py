"""The methods of HookedEncoder that turn text into tokens and back, and those that it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn, cast

import numpy as np

from graphlens.analysis.arrays import ArrayT
from graphlens.errors import InputError, checked_number
from graphlens.model.encoder_request import EncoderText
from graphlens.model.methods.text import TextMethods
from graphlens.model.text import is_text


class EncoderTextMethods(TextMethods[ArrayT]):
    """The part of HookedEncoder that turns text into tokens and back."""

    def to_tokens(  # type: ignore[override]
        self, input: str | Sequence[str], move_to_device: bool = True, truncate: bool = True
    ) -> tuple[ArrayT, ArrayT, ArrayT]:
        """Text as what ``forward`` takes. TransformerLens: the same name.

        Args:
            input: One text, or several, the shorter ones padded.
            move_to_device: TransformerLens's; changes nothing.
            truncate: Whether they are cut at n_ctx.

        Returns:
            (token ids, token types, which are zeros, a mask with 0 at padding), int64 [b, p].

        Raises:
            InputError: For a model without a tokenizer, and for what is no text.
        """
        if not is_text(input):
            raise InputError(f"to_tokens takes a text or a list of texts, not {type(input).__name__}.")
        text, to_user = cast(EncoderText[ArrayT], self.runner.text), self.runner.border.to_user
        tokens, mask = text.with_mask(input, checked_number(truncate, "truncate", bool))
        return to_user(tokens), to_user(np.zeros_like(tokens)), to_user(mask)

    def test_prompt(self, *args: object, **options: object) -> NoReturn:
        """Refused: an encoder does not continue a prompt. Raises InputError.

        Args:
            *args: What a decoder's takes.
            **options: The same by name.
        """
        raise InputError("test_prompt is for decoders. For a masked token: model(text, return_type='predictions').")

    def generate(self, *args: object, **options: object) -> NoReturn:
        """Refused: an encoder does not generate. Raises InputError.

        Args:
            *args: What a decoder's takes.
            **options: The same by name.
        """
        raise InputError(
            "an encoder does not generate: its tokens attend to later ones, which would have to be there. For a masked token: "
            "model(text, return_type='predictions')."
        )

    generate_stream = generate

    def input_to_embed(self, *args: object, **options: object) -> NoReturn:
        """Refused: an encoder's runs begin with types of tokens too. Raises InputError.

        Args:
            *args: What a decoder's takes.
            **options: The same by name.
        """
        raise InputError(
            "input_to_embed is for decoders. The embeddings of an encoder are in its cache: hook_full_embed."
        )

    def sample_datapoint(self, *args: object, **options: object) -> NoReturn:
        """Refused, as TransformerLens's encoder has no such method. Raises InputError.

        Args:
            *args: What a decoder's takes.
            **options: The same by name.
        """
        raise InputError("sample_datapoint is for decoders: draw from your data set yourself.")
