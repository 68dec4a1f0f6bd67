"""What is transformers' own where it is installed: the tokenizer that ``model.tokenizer`` is, and what a generation gives.

transformers is imported when one of them is asked for, never before.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

from graphlens.errors import InputError, warn
from graphlens.file.io_names import ATTENTION_MASK, INPUT_IDS, TOKEN_TYPE_IDS
from graphlens.file.small_tokenizer import Tokenizer
from graphlens.file.tokenizer_parts import ROLES

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

    from graphlens.file.manifest import Json

# Settings of a tokenizer's file that transformers' tokenizer is made with, and the type that each has there.
_SETTINGS = {"chat_template": str, "model_input_names": list, "clean_up_tokenization_spaces": bool}
_making = threading.Lock()


class RealTokenizer(Protocol):
    """What is asked of a tokenizer of transformers."""

    padding_side: str
    truncation_side: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    add_bos_token: bool
    name_or_path: str
    init_kwargs: dict[str, object]

    def __len__(self) -> int: ...

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        """The ids of a text."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """The text of ids."""


class TransformersTokenizer(Tokenizer):
    """A tokenizer of transformers as the model asks it. What is set on that one (``pad_token``, say) holds here at once.

    Attributes:
        real: That tokenizer.
    """

    def __init__(self, real: RealTokenizer) -> None:
        """Takes a tokenizer of transformers, fast or not. It stays the one that it is."""
        self.real, self.source, self.settings = real, "the tokenizer", None

    # These are attributes of the class above.

    @property
    def fast(self) -> FastTokenizer:  # type: ignore[override]
        """The tokenizer of the tokenizers package that it is made of.

        Raises:
            InputError: It is made of none.
        """
        found = getattr(self.real, "backend_tokenizer", None)
        if found is None:
            raise InputError(f"a {type(self.real).__name__} is not made of a tokenizer of the tokenizers package.")
        return cast("FastTokenizer", found)

    @property
    def padding_side(self) -> str:
        """Where prompts of different lengths are padded."""
        return self.real.padding_side or "right"

    @padding_side.setter
    def padding_side(self, side: str) -> None:
        self.real.padding_side = side

    @property
    def truncation_side(self) -> str:  # type: ignore[override]
        """Where a text that is too long is cut."""
        return self.real.truncation_side or "right"

    def role(self, name: str) -> str | None:
        """The text of a special token, or None."""
        return cast(str | None, getattr(self.real, name, None))

    def role_id(self, name: str) -> int | None:
        """The id of a special token, or None."""
        found = getattr(self.real, f"{name}_id", None)
        return found if isinstance(found, int) else None

    def set_role(self, name: str, token: str | int | None) -> None:
        """Sets a special token, by its text or its id."""
        setattr(self.real, f"{name}_id" if isinstance(token, int) else name, token)

    def ids_of(self, text: str, add_special_tokens: bool) -> list[int]:
        """The ids of a text."""
        # Not the tokenizer inside it: that one keeps the padding and truncation of the call before.
        return list(self.real.encode(text, add_special_tokens=add_special_tokens, verbose=False))

    def text_of(self, ids: list[int], skip_special_tokens: bool) -> str:
        """The text of ids."""
        options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        return str(self.real.decode(ids, **options))

    def get_vocab(self) -> dict[str, int]:
        """Every token as the tokenizer writes it, and its id."""
        return self.real.get_vocab()

    def __len__(self) -> int:
        return len(self.real)


def wrapped(given: object) -> Tokenizer:
    """A tokenizer as the model asks it, of one that a user gave.

    Args:
        given: One of transformers, or of graphlens.

    Raises:
        InputError: It is neither.
    """
    if isinstance(given, Tokenizer):
        return given
    transformers = sys.modules.get("transformers")  # whoever has such a tokenizer has imported it
    if transformers is None or not isinstance(given, transformers.PreTrainedTokenizerBase):
        raise InputError(
            f"a {type(given).__name__} is not a tokenizer of transformers: load one with AutoTokenizer.from_pretrained."
        )
    return TransformersTokenizer(cast(RealTokenizer, given))


def set_up(tokenizer: Tokenizer, put_bos_first: bool) -> Tokenizer:
    """A tokenizer that a user gave, as TransformerLens sets one up: BOS before every text, and no special token missing.

    Args:
        tokenizer: One of graphlens stays as it is. One of transformers gets EOS for a missing BOS and PAD.
        put_bos_first: True has it put BOS before every text that it encodes with special tokens, if it names one.

    Returns:
        The same tokenizer, or a copy where it did not put BOS first.
    """
    if not isinstance(tokenizer, TransformersTokenizer):
        return tokenizer
    real = tokenizer.real
    if put_bos_first and real.bos_token is not None and not getattr(real, "add_bos_token", True):
        changed = copy.deepcopy(real)
        try:
            changed.add_bos_token = True
            real = changed
        except ValueError:  # a token that transformers' template cannot say: TransformerLens leaves it as it is, too
            pass
    if real.padding_side is None:
        real.padding_side = "right"
    if real.eos_token is None:
        real.eos_token = "<|endoftext|>"
    if real.pad_token is None:
        real.pad_token = real.eos_token
    if real.bos_token is None:
        real.bos_token = real.eos_token
    return TransformersTokenizer(real)


def real_of(tokenizer: Tokenizer, name: str, token_types: bool = False) -> Tokenizer:
    """The tokenizer of a folder as one of transformers, the same token for token.

    Args:
        tokenizer: What ``load_tokenizer`` gave.
        name: What it is to be called.
        token_types: True for a model that is fed types of tokens; they are then among what it gives.

    Returns:
        It, as the model asks it; the given one where transformers is not installed, and where it was made by hand.
    """
    if tokenizer.settings is None:
        return tokenizer
    with _making:
        try:
            from transformers import PreTrainedTokenizerFast
        except ImportError:
            return tokenizer
        told = {key: value for key, kind in _SETTINGS.items() if isinstance(value := tokenizer.settings.get(key), kind)}
        if token_types:
            told.setdefault("model_input_names", [INPUT_IDS, TOKEN_TYPE_IDS, ATTENTION_MASK])
        try:
            made = PreTrainedTokenizerFast(
                tokenizer_object=tokenizer.fast,
                padding_side=tokenizer.padding_side,
                truncation_side=tokenizer.truncation_side,
                model_max_length=tokenizer.model_max_length,
                **told,
            )
            # Given here and not above: there, each would be made a token that no text is split at, where it is none.
            for role in ROLES:
                setattr(made, role, tokenizer.role(role))
            made.extra_special_tokens = _extra(tokenizer)
            if tokenizer.adds_bos:
                made.add_bos_token = True
        except Exception as error:  # noqa: BLE001  # whatever a stranger's settings lead to in there
            warn(
                f"transformers makes no tokenizer of {tokenizer.source} ({error}): model.tokenizer is graphlens's small one. "
                "Give one of your own with model.set_tokenizer."
            )
            tokenizer.settings = None  # said once
            return tokenizer
        made.name_or_path = made.init_kwargs["name_or_path"] = name  # not above: it would be looked up on the hub
        return TransformersTokenizer(made)


def _extra(tokenizer: Tokenizer) -> list[str]:
    """The special tokens without a role that a tokenizer's settings name, as far as it knows them."""
    settings = tokenizer.settings or {}
    named: Json = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    tokens = named if isinstance(named, list) else []
    texts = [token.get("content") if isinstance(token, dict) else token for token in tokens]
    return [text for text in texts if isinstance(text, str) and tokenizer.fast.token_to_id(text) is not None]


def generate_output(sequences: object, logits: Sequence[object]) -> object | None:
    """What transformers' ``generate`` gives for a decoder.

    Args:
        sequences: Token ids, a tensor [b, p].
        logits: Tensors [b, V], one for each new token.

    Returns:
        Its ``GenerateDecoderOnlyOutput``; None where transformers is not installed.
    """
    try:
        from transformers.generation.utils import GenerateDecoderOnlyOutput
    except ImportError:
        return None
    return cast(object, GenerateDecoderOnlyOutput(sequences=sequences, logits=tuple(logits)))
