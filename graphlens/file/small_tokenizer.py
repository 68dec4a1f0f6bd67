"""Text to token ids and back with the tokenizers package alone, under the names that transformers' tokenizers have."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, NoReturn, ParamSpec, TypeVar, cast

import numpy as np
import numpy.typing as npt

from graphlens.errors import InputError, is_one_of
from graphlens.file.io_names import ATTENTION_MASK, INPUT_IDS
from graphlens.file.tokenizer_parts import ROLES, Encoded, Role, RoleId, asking, checked_ids, checked_text, is_one

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

    from graphlens.file.manifest import Json

_UNBOUNDED = 10**30  # what transformers says where nothing bounds the length of a text
Taken = ParamSpec("Taken")
Given = TypeVar("Given")


def _asking(method: Callable[Concatenate[Tokenizer, Taken], Given]) -> Callable[Concatenate[Tokenizer, Taken], Given]:
    """A method in which a panic of the tokenizers package becomes an error that names the tokenizer's file."""

    @functools.wraps(method)
    def wrapped(self: Tokenizer, /, *args: Taken.args, **kwargs: Taken.kwargs) -> Given:
        with asking(self.source):
            return method(self, *args, **kwargs)

    return wrapped


class Tokenizer:
    """A tokenizer with the names of transformers', for where transformers is not installed.

    Attributes:
        padding_side: "right" or "left": where prompts of different lengths are padded. It may be set.
        truncation_side: "right" or "left": where a text that is too long is cut. It may be set.
        source: The file that it was loaded from, or what it is called in messages.
        settings: What its settings file says; None for a tokenizer that was made by hand.
        name_or_path: What it is called, "" where nobody said.
        model_max_length: How many tokens the settings allow a text to have.
        adds_bos: True if BOS was put before every text by ``put_bos_first``.
    """

    is_fast = True
    bos_token, eos_token, pad_token, mask_token = Role(), Role(), Role(), Role()
    unk_token, sep_token, cls_token = Role(), Role(), Role()
    bos_token_id, eos_token_id, pad_token_id, mask_token_id = RoleId(), RoleId(), RoleId(), RoleId()
    unk_token_id, sep_token_id, cls_token_id = RoleId(), RoleId(), RoleId()

    def __init__(
        self,
        fast: FastTokenizer,
        special: Mapping[str, str],
        padding_side: str = "right",
        source: Path | str = "the tokenizer",
        settings: Mapping[str, Json] | None = None,
    ) -> None:
        """Takes a tokenizer of the tokenizers package.

        Args:
            fast: That tokenizer; its own padding and truncation are switched off.
            special: "bos_token", "eos_token" and so on -> their texts, as far as there are any. BOS and PAD are EOS where
                they are not named, as in TransformerLens.
            padding_side: Where prompts of different lengths are padded.
            source: The file that it was loaded from, or what it is called in messages.
            settings: What its settings file says.

        Raises:
            ModelFileError: The tokenizers package cannot encode with it.
        """
        self.source, self.settings = source, settings
        fast.no_padding()  # tokenizer files may ask for both, and encode would then pad and cut unasked
        fast.no_truncation()
        self.fast = fast
        self.padding_side, self.truncation_side = padding_side, "right"
        self.name_or_path, self.adds_bos = "", False
        limit = (settings or {}).get("model_max_length")
        self.model_max_length = int(limit) if isinstance(limit, int | float) and limit >= 1 else _UNBOUNDED
        eos = {} if "eos_token" not in special else dict.fromkeys(("bos_token", "pad_token"), special["eos_token"])
        self._roles: dict[str, str | None] = {**dict.fromkeys(ROLES), **eos, **special}
        self.names_bos = "bos_token" in special
        self.encode("a")

    # What a subclass has to know: how transformers' tokenizer does the same is in graphlens.model.of_transformers

    def role(self, name: str) -> str | None:
        """The text of a special token ("bos_token", say), or None."""
        return self._roles[name]

    def role_id(self, name: str) -> int | None:
        """The id of a special token, or None."""
        token = self.role(name)
        return None if token is None else self.fast.token_to_id(token)

    def set_role(self, name: str, token: str | int | None) -> None:
        """Sets a special token, as ``tokenizer.pad_token = "..."`` does.

        Args:
            name: "pad_token", say.
            token: Its text, its id, or None for none.

        Raises:
            InputError: It is no token of this tokenizer.
        """
        text = self.fast.id_to_token(checked_ids(token)[0]) if isinstance(token, int) else token
        if text is not None and (not isinstance(text, str) or self.fast.token_to_id(text) is None):
            raise InputError(f"{name} cannot be {token!r:.60}: this tokenizer has no such token.")
        if text is None and token is not None:
            raise InputError(f"{name} cannot be {token!r:.60}: ids go from 0 to {len(self) - 1}.")
        self._roles[name] = text

    def ids_of(self, text: str, add_special_tokens: bool) -> list[int]:
        """The ids of a text that was checked."""
        return list(self.fast.encode(text, add_special_tokens=add_special_tokens).ids)

    def text_of(self, ids: list[int], skip_special_tokens: bool) -> str:
        """The text of ids that were checked."""
        return str(self.fast.decode(ids, skip_special_tokens=skip_special_tokens))

    def get_vocab(self) -> dict[str, int]:
        """Every token as the tokenizer writes it, and its id."""
        return dict(self.fast.get_vocab(with_added_tokens=True))

    def __len__(self) -> int:
        return int(self.fast.get_vocab_size(with_added_tokens=True))

    # Special tokens

    @property
    def prepends_bos(self) -> bool:
        """True if encoding with special tokens puts BOS before a text."""
        plain = self.encode("a")
        return bool(plain) and self.bos_token_id is not None and plain[0] == self.bos_token_id

    def put_bos_first(self) -> None:
        """Has encoding with special tokens put BOS before a text, and nothing else, as TransformerLens sets a tokenizer up.

        Nothing changes where the files name no BOS token.
        """
        from tokenizers.processors import TemplateProcessing

        bos, index = self.bos_token, self.bos_token_id
        if not self.names_bos or bos is None or index is None:
            return
        try:
            template = TemplateProcessing(f"{bos}:0 $A:0", f"{bos}:0 $A:0 {bos}:1 $B:1", [(bos, index)])
        except (
            ValueError
        ):  # a token that the template's syntax cannot say ("<seed:bos>"): it is left as it is there, too
            return
        self.fast.post_processor, self.adds_bos = template, True

    def require_bos(self) -> int:
        """The id of the BOS token.

        Raises:
            InputError: The tokenizer has none.
        """
        if self.bos_token_id is None:
            raise InputError("this tokenizer has no BOS token: pass prepend_bos=False.")
        return self.bos_token_id

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens that there are: role -> text."""
        return {name: token for name in ROLES if (token := self.role(name)) is not None}

    @property
    def all_special_tokens(self) -> list[str]:
        """The texts of the special tokens, each once."""
        return list(dict.fromkeys(self.special_tokens_map.values()))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of the special tokens, each once."""
        return cast(list[int], self.convert_tokens_to_ids(self.all_special_tokens))

    # The vocabulary

    @property
    def vocab(self) -> dict[str, int]:
        """Every token as the tokenizer writes it, and its id."""
        return self.get_vocab()

    @property
    def vocab_size(self) -> int:
        """The number of tokens without added ones, as transformers counts; ``len(tokenizer)`` has all."""
        return int(self.fast.get_vocab_size(with_added_tokens=False))

    @_asking
    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """The tokens of a text as the tokenizer writes them ("Ġ" for a space, say).

        Args:
            text: The text.
            add_special_tokens: Put special tokens around it.
        """
        return list(self.fast.encode(checked_text(text), add_special_tokens=add_special_tokens).tokens)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        """The id of a token as the tokenizer writes it, or those of several; that of UNK, or None, for what is none."""
        if isinstance(tokens, str):
            found = self.fast.token_to_id(tokens)
            return self.unk_token_id if found is None else found
        return [cast(int | None, self.convert_tokens_to_ids(token)) for token in tokens]

    def convert_ids_to_tokens(
        self, ids: npt.ArrayLike, skip_special_tokens: bool = False
    ) -> str | list[str | None] | None:
        """The token of an id as the tokenizer writes it, or those of several.

        Args:
            ids: An id, or integers [p].
            skip_special_tokens: Leave out special tokens.
        """
        if is_one(ids):
            return self.fast.id_to_token(checked_ids(ids)[0])
        left_out = set(self.all_special_ids) if skip_special_tokens else set()
        return [self.fast.id_to_token(index) for index in checked_ids(ids) if index not in left_out]

    @_asking
    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens as the tokenizer writes them."""
        return str(self.fast.decoder.decode(list(tokens))) if self.fast.decoder is not None else " ".join(tokens)

    # Text to ids and back

    @_asking
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text.

        Args:
            text: The text.
            add_special_tokens: Put special tokens around it: BOS before it where the tokenizer names one.

        Raises:
            InputError: It is no text, or holds what is no character.
        """
        return self.ids_of(checked_text(text), add_special_tokens)

    @_asking
    def decode(
        self, tokens: npt.ArrayLike, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """The text of token ids.

        Args:
            tokens: Integers [p], or one.
            skip_special_tokens: Leave out special tokens.
            clean_up_tokenization_spaces: transformers'; changes nothing.

        Raises:
            InputError: For what is no id of a token.
        """
        return self.text_of(checked_ids(tokens), skip_special_tokens)

    def batch_decode(
        self,
        tokens: Iterable[npt.ArrayLike],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> list[str]:
        """The text of each row of token ids.

        Args:
            tokens: Integers [b, p], or rows of different lengths; a single row gives one text.
            skip_special_tokens: Leave out special tokens.
            clean_up_tokenization_spaces: transformers'; changes nothing.
        """
        if not isinstance(tokens, Iterable) or isinstance(tokens, str | bytes):
            raise InputError(f"rows of token ids are wanted, not {tokens!r:.60}.")
        rows = list(tokens)
        if rows and all(map(is_one, rows)):
            return [self.decode(cast(npt.ArrayLike, rows), skip_special_tokens)]
        return [self.decode(row, skip_special_tokens) for row in rows]

    def __call__(
        self,
        text: str | Sequence[str],
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool = True,
    ) -> Encoded:
        """The token ids of a text or of several, as transformers' tokenizers give them.

        Args:
            text: A text, for a list of ids, or a list of texts, for a list of lists.
            add_special_tokens: Put special tokens around each.
            padding: True or "longest" pads to the longest text, "max_length" to ``max_length``.
            truncation: Whether longer texts are cut at ``max_length``.
            max_length: See above; None for ``model_max_length``.
            return_tensors: "np" for arrays int64 [b, p]; None for lists.
            padding_side: "right" or "left"; None for the tokenizer's own.
            return_attention_mask: Whether there is a mask, 1 at real tokens and 0 at padding.

        Returns:
            ``input_ids`` and ``attention_mask``.

        Raises:
            InputError: For what is no text, "pt" as tensors, and padding without a PAD token.
        """
        if not is_one_of(return_tensors, (None, "np")):
            raise InputError(
                f"return_tensors={return_tensors!r}: this is graphlens's small tokenizer, which gives lists, or arrays with "
                "'np'. Install transformers for others, or use model.to_tokens(text)."
            )
        several = not isinstance(text, str | bytes) and isinstance(text, Iterable)
        texts = list(text) if several else [cast(str, text)]
        limit = self.model_max_length if max_length is None else max_length
        extra = len(self.encode("")) if add_special_tokens else 0
        rows = []
        for each in texts:
            row = self.encode(each, add_special_tokens)
            if truncation and len(row) > limit:
                left = is_one_of(self.truncation_side, ("left",))
                row = [*row[:extra], *row[len(row) - limit + extra :]] if left else row[:limit]
            rows.append(row)
        width = max(map(len, rows), default=0) if is_one_of(padding, ("longest",)) or padding is True else 0
        width = limit if is_one_of(padding, ("max_length",)) else width
        pad, left = self.pad_token_id, (padding_side or self.padding_side) == "left"
        if pad is None and any(len(row) < width for row in rows):
            raise InputError("padding needs a PAD token, and this tokenizer has none: set tokenizer.pad_token.")
        ids, mask = [], []
        for row in rows:
            fill = [cast(int, pad)] * (width - len(row))
            ids.append([*fill, *row] if left else [*row, *fill])
            ones, zeros = [1] * len(row), [0] * len(fill)
            mask.append([*zeros, *ones] if left else [*ones, *zeros])
        named = {INPUT_IDS: ids, **({ATTENTION_MASK: mask} if return_attention_mask else {})}
        if return_tensors is not None:
            if len(set(map(len, ids))) > 1:
                raise InputError("texts of different lengths make no array: pass padding=True.")
            return Encoded({name: np.asarray(value, np.int64).reshape(len(ids), -1) for name, value in named.items()})
        return Encoded(named if several else {name: value[0] for name, value in named.items()})

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # copying and pickling look for such names
            raise AttributeError(name)
        raise AttributeError(
            f"graphlens's small tokenizer has no {name!r}: it stands in for transformers' own, which model.tokenizer is where "
            "transformers is installed (pip install transformers)."
        )
