"""The tokenizer of a model: what the model asks, what users get, and where it pads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphlens.errors import InputError, is_one_of

if TYPE_CHECKING:
    from graphlens.engine.engine import Engine
    from graphlens.file.tokenizer import Tokenizer
    from graphlens.model.of_transformers import RealTokenizer

# Architectures whose tokenizer TransformerLens's set_tokenizer leaves as it is.
_LEFT_AS_THEY_ARE = ("OlmoForCausalLM", "OlmoeForCausalLM", "Olmo2ForCausalLM")


class HeldTokenizer:
    """A model's tokenizer, which may be replaced.

    Args:
        engine: The model's engine.
        tokenizer: The tokenizer; None for a model without one.

    Attributes:
        tokenizer: What the model itself asks; ``exposed`` is what users get. It may be replaced: see ``take``.
        own_tokenizer: The one that the model was opened with.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self._engine = engine
        self.tokenizer = self.own_tokenizer = tokenizer
        self._side_without_tokenizer = "right"
        if tokenizer is not None and tokenizer.settings is not None:
            tokenizer.name_or_path = engine.manifest.source  # with its owner, so that the hub finds it
            if self._puts_bos_first():
                tokenizer.put_bos_first()

    def use(self, engine: Engine) -> None:
        """Goes on with another engine over the same file."""
        self._engine = engine

    def _puts_bos_first(self) -> bool:
        """True if ``tokenizer(text)`` is to begin with BOS, as in TransformerLens."""
        config = self._engine.manifest.config
        return not config.is_encoder and config.original_architecture not in _LEFT_AS_THEY_ARE

    @property
    def exposed(self) -> Tokenizer | RealTokenizer | None:
        """The tokenizer as users get it: transformers' own where transformers is installed, which imports it."""
        from graphlens.model.of_transformers import TransformersTokenizer, real_of

        if self.tokenizer is not None and self.tokenizer.settings is not None:
            manifest = self._engine.manifest
            real = real_of(self.tokenizer, manifest.source, token_types=(manifest.config.n_token_types or 0) > 1)
            if self.own_tokenizer is self.tokenizer:
                self.own_tokenizer = real
            self.tokenizer = real
        return self.tokenizer.real if isinstance(self.tokenizer, TransformersTokenizer) else self.tokenizer

    def take(self, tokenizer: object, as_it_is: bool = False) -> None:
        """Goes on with another tokenizer.

        Args:
            tokenizer: One of transformers or of graphlens, or None for none.
            as_it_is: False sets up one of transformers as TransformerLens's ``set_tokenizer`` does.

        Raises:
            InputError: For anything else; the tokenizer stays the one that it is.
        """
        from graphlens.model.of_transformers import set_up, wrapped

        found = None if tokenizer is None else wrapped(tokenizer)
        if found is not None and not (as_it_is or self._engine.manifest.config.is_encoder):
            found = set_up(found, self._puts_bos_first())
        self.tokenizer = found

    @property
    def default_padding_side(self) -> str:
        """Where prompts are padded unless a call says: the tokenizer's own ``padding_side`` when there is one.

        So ``model.tokenizer.padding_side = "left"`` works as in TransformerLens. Set it after ``tokenizer``.
        """
        return self._side_without_tokenizer if self.tokenizer is None else self.tokenizer.padding_side

    @default_padding_side.setter
    def default_padding_side(self, side: str) -> None:
        side = checked_side(side)
        if self.tokenizer is None:
            self._side_without_tokenizer = side
        else:
            self.tokenizer.padding_side = side

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            InputError: For a model without one.
        """
        if self.tokenizer is None:
            raise InputError(
                f"{self._engine.folder} has no tokenizer: pass token ids, not text, or give the model one with "
                "model.set_tokenizer(...)."
            )
        return self.tokenizer

    def side(self, padding_side: str | None) -> str:
        """The side that a call pads on.

        Args:
            padding_side: "right", "left", or None for the default.

        Raises:
            InputError: For anything else.
        """
        return checked_side(self.default_padding_side if padding_side is None else padding_side)


def checked_side(side: str) -> str:
    """The side as it is, if it is one.

    Args:
        side: "right" or "left".

    Raises:
        InputError: For anything but "right" and "left".
    """
    if not is_one_of(side, ("right", "left")):
        raise InputError(f"padding_side must be 'right' or 'left', not {side!r}.")
    return side
