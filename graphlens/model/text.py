"""Text in and out of a model: the tokenizer helpers of HookedTransformer, with TransformerLens's BOS and padding rules."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens.analysis import numerics
from graphlens.errors import InputError
from graphlens.file.tokenizer import Tokenizer
from graphlens.model.border import NumpyFace

TokensOrText = Any
Tokens = npt.NDArray[np.int64]


class TextMethods(NumpyFace):
    """The part of HookedTransformer that turns text into tokens and back."""

    tokenizer: Tokenizer | None
    _default_prepend_bos: bool
    _padding_side_without_tokenizer: str = "right"

    @property
    def _default_padding_side(self) -> str:
        """Where prompts are padded unless a call says else; the tokenizer's own ``padding_side`` when there is one, so
        that ``model.tokenizer.padding_side = "left"`` works as in TransformerLens. Set it after ``tokenizer``."""
        return self._padding_side_without_tokenizer if self.tokenizer is None else self.tokenizer.padding_side

    @_default_padding_side.setter
    def _default_padding_side(self, side: str) -> None:
        side = _checked_side(side)
        if self.tokenizer is None:
            self._padding_side_without_tokenizer = side
        else:
            self.tokenizer.padding_side = side

    def set_tokenizer(self, tokenizer: Any, default_padding_side: str | None = None) -> None:
        """Replaces the tokenizer by a fast transformers one (copied) or one of graphlens's.

        ``default_padding_side`` None is the tokenizer's own. Raises InputError for another kind or side.
        """
        side = None if default_padding_side is None else _checked_side(default_padding_side)
        self.tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.from_transformers(tokenizer)
        if side is not None:
            self.tokenizer.padding_side = side

    # Text to tokens

    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Any:
        """Text -> token ids int64 [b, p]; one string gives b = 1.

        ``prepend_bos`` and ``padding_side`` ("right" or "left": where shorter prompts get PAD) default to the model's;
        ``truncate`` cuts at n_ctx. ``move_to_device`` is TransformerLens's and changes nothing. An empty string without
        BOS is no token, p = 0, which a run refuses. Raises InputError for a model without a tokenizer, another padding
        side.
        """
        return self._to_user(self._token_array(input, prepend_bos, truncate, padding_side))

    def to_single_token(self, string: str) -> int:
        """The id of a string that is exactly one token. Raises InputError when it is none or several."""
        ids = self._need_tokenizer().encode(string)
        if len(ids) != 1:
            raise InputError(f"{string!r} is {len(ids)} tokens ({self._str_tokens(ids)}), not one.")
        return ids[0]

    def get_token_position(
        self,
        single_token: str | int | Any,
        input: TokensOrText,
        mode: str = "first",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> int:
        """The position of a token (an id, or a string that is one token) in a prompt or in ids [p] or [1, p].

        ``mode``: "first" or "last" occurrence. Raises InputError when the token is not there, and for several prompts.
        """
        if mode not in ("first", "last"):
            raise InputError(f"mode must be 'first' or 'last', not {mode!r}.")
        token = self.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
        rows = self._token_array(input, prepend_bos, True, padding_side) if _is_text(input) else self._ids(input)
        if rows.shape[0] != 1:
            raise InputError(f"get_token_position takes one prompt, not {rows.shape[0]}.")
        found = np.flatnonzero(rows[0] == token)
        if found.size == 0:
            known = self.tokenizer is not None and 0 <= token < self.tokenizer.vocab_size
            text = f" ({self._str_tokens([token])[0]!r})" if known else ""
            raise InputError(f"token {token}{text} does not occur in the prompt of {rows.shape[1]} tokens.")
        return int(found[0 if mode == "first" else -1])

    def tokens_to_residual_directions(self, tokens: Any) -> Any:
        """The columns of W_U that tokens are read off with: a copy, [..., d_model] for tokens of shape [...].

        ``tokens``: an id, a string that is one token, or ids of any shape; a single id in any shape gives [d_model].
        These are directions of the residual stream only where the final norm is folded (``fold_ln``). Raises InputError
        for ids outside the vocabulary and strings that are not one token.
        """
        ids = self._token_ids(self.to_single_token(tokens) if isinstance(tokens, str) else tokens)
        rows = self._engine.weights["unembed.W_U"].T
        return self._to_user(np.array(rows[ids.reshape(()) if ids.size == 1 else ids]))

    # Tokens to text

    def to_string(self, tokens: Any) -> str | list[str]:
        """Token ids [p] (or one id) -> text; [b, p] -> a list of texts. Raises InputError for ids that are no tokens."""
        tokenizer, ids = self._need_tokenizer(), self._token_ids(tokens, decoding=True)
        if ids.ndim > 2:
            raise InputError(f"tokens must have shape [batch, pos] or [pos], not {list(ids.shape)}.")
        if ids.ndim == 2:
            return [tokenizer.decode(row) for row in ids.tolist()]
        return tokenizer.decode(np.atleast_1d(ids).tolist())

    def to_str_tokens(
        self, input: TokensOrText, prepend_bos: bool | None = None, padding_side: str | None = None
    ) -> list[str] | list[list[str]]:
        """The text of each token: of a string or ids [p] -> a list; of several strings or ids [b, p] -> a list of lists.

        Strings are cut at n_ctx and not padded. Raises InputError for ids that are no tokens.
        """
        _checked_side(padding_side or "right")
        if isinstance(input, str):
            return self._str_tokens(self._encode(input, prepend_bos, truncate=True))
        if _is_text(input):
            return [self._str_tokens(self._encode(text, prepend_bos, truncate=True)) for text in input]
        ids = self._token_ids(input, decoding=True)
        if ids.ndim == 2 and ids.shape[0] > 1:
            return [self._str_tokens(row) for row in ids.tolist()]
        if ids.ndim > 2:
            raise InputError(f"tokens must have shape [batch, pos] or [pos], not {list(ids.shape)}.")
        return self._str_tokens(ids.reshape(-1).tolist())

    def to_single_str_token(self, int_token: int) -> str:
        """The text of one token id. Raises InputError for an id outside the vocabulary."""
        ids = self._token_ids(int_token, decoding=True)
        if ids.size != 1:
            raise InputError(f"to_single_str_token takes one token id, not {ids.size}.")
        return self._str_tokens(ids.reshape(-1).tolist())[0]

    # A look at a prompt

    def test_prompt(
        self,
        prompt: str,
        answer: str | Sequence[str],
        prepend_space_to_answer: bool = True,
        print_details: bool = True,
        prepend_bos: bool | None = None,
        top_k: int = 10,
    ) -> None:
        """Prints how well the model completes ``prompt``: each answer token's rank, logit (its unit) and probability,
        and the ``top_k`` likeliest tokens in its place.

        Several answers are compared by their first tokens. ``print_details=False`` prints the ranks alone. The active
        hooks apply. Raises InputError for an empty answer or a prompt too long. TransformerLens: ``test_prompt``.
        """
        answers = [answer] if isinstance(answer, str) else list(answer)
        if prepend_space_to_answer:
            answers = [text if text.startswith(" ") else f" {text}" for text in answers]
        rows = [self._need_tokenizer().encode(text) for text in answers]
        if not rows or not all(rows):
            raise InputError(f"every answer needs at least one token; got {answers}.")
        wanted = np.asarray([row[:1] for row in rows] if len(rows) > 1 else rows, np.int64)  # [answers, answer tokens]
        start = self._padded(_some(self._rows(prompt, prepend_bos, truncate=False)), "right")
        tokens = np.concatenate([start.repeat(len(wanted), 0), wanted], axis=1)
        model: Any = self
        logits = self._from_user(model.forward(self._to_user(tokens)))[:, start.shape[1] - 1 : -1].astype(np.float32)
        _print_completions(self, start[0], wanted, logits, top_k if print_details else None)

    # Inside

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(f"{self._engine.folder} has no tokenizer: pass token ids, not text.")
        return self.tokenizer

    def _encode(self, text: str, prepend_bos: bool | None, truncate: bool) -> list[int]:
        tokenizer = self._need_tokenizer()
        bos = self._default_prepend_bos if prepend_bos is None else prepend_bos
        ids = [*([tokenizer.require_bos()] if bos else []), *tokenizer.encode(text)]
        return ids[: self._engine.manifest.config.n_ctx] if truncate else ids

    def _rows(self, input: str | Sequence[str], prepend_bos: bool | None, truncate: bool) -> list[list[int]]:
        texts = [input] if isinstance(input, str) else list(input)
        return [self._encode(text, prepend_bos, truncate) for text in texts]

    def _padded(self, rows: Sequence[Sequence[int]], side: str) -> Tokens:
        width, pad = max(map(len, rows)), self._need_tokenizer().pad_token_id
        if pad is None and any(len(row) < width for row in rows):
            raise InputError("prompts of different lengths need a PAD token, and this tokenizer has none.")
        fills = [[pad] * (width - len(row)) for row in rows]
        both = zip(rows, fills, strict=True)
        return np.asarray([[*fill, *row] if side == "left" else [*row, *fill] for row, fill in both], np.int64)

    def _side(self, padding_side: str | None) -> str:
        return _checked_side(self._default_padding_side if padding_side is None else padding_side)

    def _token_array(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        truncate: bool = True,
        padding_side: str | None = None,
    ) -> Tokens:
        """Text -> int64 [b, p], padded with PAD."""
        side = self._side(padding_side)
        return self._padded(self._rows(input, prepend_bos, truncate), side)

    def _tokens(self, input: TokensOrText, prepend_bos: bool | None, padding_side: str | None = None) -> Tokens:
        """What a run takes -> int64 [b, p], every id inside the vocabulary, at most n_ctx of them."""
        return self._tokens_and_mask(input, prepend_bos, padding_side)[0]

    def _tokens_and_mask(
        self,
        input: TokensOrText,
        prepend_bos: bool | None,
        padding_side: str | None = None,
        followed: bool = False,
        truncate: bool = True,
    ) -> tuple[Tokens, Tokens | None]:
        """The tokens of a run, and int64 [b, p] with 0 at padding; None where nothing has to be masked.

        Padding on the right needs a mask only where other tokens follow (``followed``): causal attention never looks at
        it before. ``truncate`` cuts text at n_ctx and warns of it; ids are never cut.
        """
        side = self._side(padding_side)
        masked = side == "left" or followed
        if not _is_text(input):
            tokens = self._validated(self._ids(input))
            return tokens, self._guessed_mask(tokens, prepend_bos, side) if masked else None
        rows = _some(self._rows(input, prepend_bos, truncate=False))
        cfg = self._engine.manifest.config
        n_ctx = cfg.n_ctx
        cut = [str(len(row) - n_ctx) for row in rows if len(row) > n_ctx]
        if truncate and cut:
            warnings.warn(
                f"{', '.join(cut)} tokens were cut from the end of the text: {cfg.model_name} takes at most {n_ctx} (n_ctx).",
                UserWarning,
                stacklevel=5,  # the caller of forward or run_with_cache
            )
            rows = [row[:n_ctx] for row in rows]
        tokens = self._validated(self._padded(rows, side))
        lengths, index = np.asarray([[len(row)] for row in rows]), np.arange(tokens.shape[1])
        mask = index >= index.size - lengths if side == "left" else index < lengths
        return tokens, mask.astype(np.int64) if masked and not mask.all() else None

    def _guessed_mask(self, tokens: Tokens, prepend_bos: bool | None, side: str) -> Tokens | None:
        """TransformerLens's guess at a mask from ids alone: on the side of the padding a row's outermost PADs are it;
        on the left not the last of them when BOS has the same id and prompts begin with BOS."""
        if self.tokenizer is None or self.tokenizer.pad_token_id is None:
            return None
        real = tokens != self.tokenizer.pad_token_id
        if side == "right":
            mask = np.logical_or.accumulate(real[:, ::-1], axis=1)[:, ::-1]
            return None if mask.all() else mask.astype(np.int64)
        mask = np.logical_or.accumulate(real, axis=1)
        bos = self._default_prepend_bos if prepend_bos is None else prepend_bos
        if bos and self.tokenizer.bos_token_id == self.tokenizer.pad_token_id:
            mask[:, :-1] |= mask[:, 1:].copy()
            mask[:, -1] = True
        return None if mask.all() else mask.astype(np.int64)

    def _validated(self, tokens: npt.NDArray[Any]) -> Tokens:
        cfg = self._engine.manifest.config
        if tokens.size == 0:
            raise InputError("the input is empty: it holds no token.")
        _check_vocabulary(tokens, cfg.d_vocab)
        if tokens.shape[1] > cfg.n_ctx:
            raise InputError(f"{tokens.shape[1]} tokens, and {cfg.model_name} takes at most {cfg.n_ctx} (n_ctx).")
        return tokens.astype(np.int64, copy=False)  # only now: a large unsigned id would wrap around

    def _array(self, input: Any) -> npt.NDArray[Any]:
        try:
            return self._from_user(input)
        except TypeError:
            return np.asarray(input)

    def _token_ids(self, input: Any, decoding: bool = False) -> npt.NDArray[Any]:
        """Ids of any shape. ``decoding`` allows those that only the tokenizer knows: vocabularies differ in size."""
        ids = self._array(input)
        if ids.size and not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"tokens must be integers, not {ids.dtype}.")
        size = self._engine.manifest.config.d_vocab
        _check_vocabulary(ids, max(size, self._need_tokenizer().vocab_size) if decoding else size)
        return ids.astype(np.int64, copy=False)

    def _ids(self, input: Any) -> npt.NDArray[Any]:
        if isinstance(input, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in input):
            lengths = [len(row) if isinstance(row, (list, tuple)) else -1 for row in input]
            if len(set(lengths)) > 1:
                raise InputError(
                    f"ragged token lists (lengths {lengths}): pad them, or pass strings to have that done."
                )
        try:
            array = self._array(input)
        except ValueError as error:
            raise InputError("ragged token lists: pad them, or pass strings to have that done.") from error
        if array.size and not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"tokens must be integers, not {array.dtype}.")
        if array.ndim not in (1, 2):
            raise InputError(f"tokens must have shape [batch, pos] or [pos], not {list(array.shape)}.")
        return np.atleast_2d(array)

    def _str_tokens(self, ids: Sequence[int]) -> list[str]:
        tokenizer = self._need_tokenizer()
        return [tokenizer.decode([token]) for token in ids]


def _is_text(input: Any) -> bool:
    return isinstance(input, str) or (
        isinstance(input, (list, tuple)) and len(input) > 0 and all(isinstance(text, str) for text in input)
    )


def _some(rows: list[list[int]]) -> list[list[int]]:
    """The rows as they are. Raises InputError where none holds a token."""
    if not any(rows):
        raise InputError("the prompt is empty: it holds no token. Pass some text, or prepend_bos=True.")
    return rows


def _checked_side(side: str) -> str:
    if side not in ("right", "left"):
        raise InputError(f"padding_side must be 'right' or 'left', not {side!r}.")
    return side


def _check_vocabulary(ids: npt.NDArray[Any], size: int) -> None:
    if ids.size:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            bad = low if low < 0 else high
            raise InputError(f"token id {bad} is outside the vocabulary: ids go from 0 to {size - 1}.")


def _print_completions(
    model: TextMethods, prompt: Tokens, wanted: Tokens, logits: npt.NDArray[Any], top_k: int | None
) -> None:
    """Prints ``test_prompt``'s findings: wanted [answers, a], logits [answers, a, V]; ``top_k`` None for ranks alone."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)

    def line(logit: float, probability: float, token: str) -> str:
        return escape(f"Logit: {logit:6.2f}  Prob: {probability:7.2%}  Token: {token!r}")

    answers = [model._str_tokens(row) for row in wanted.tolist()]
    if top_k is not None:
        console.print(escape(f"Prompt tokens: {model._str_tokens(prompt.tolist())}"))
        console.print(escape(f"Answer tokens: {answers if len(answers) > 1 else answers[0]}"))
    ranks: list[list[tuple[str, int]]] = []
    for at in range(wanted.shape[1]):
        here, probabilities = logits[:, at], numerics.softmax(logits[:, at])
        order = np.argsort(-here, axis=-1, kind="stable")
        ranks.append([])
        for i, token in enumerate(wanted[:, at].tolist()):
            rank = int(np.flatnonzero(order[i] == token)[0])
            ranks[-1].append((answers[i][at], rank))
            if top_k is not None:
                shown = line(here[i, token], probabilities[i, token], answers[i][at])
                console.print(f"[b]Rank: {rank:<6} {shown}[/b]")
        for place, token in enumerate(order[0, : top_k or 0].tolist()):
            shown = line(here[0, token], probabilities[0, token], model._str_tokens([token])[0])
            console.print(f"Top {place:<7} {shown}")
    found = ranks if len(answers) > 1 else [row[0] for row in ranks]
    console.print(f"[b]Ranks of the answer tokens:[/b] {escape(str(found))}")


def test_prompt(  # TransformerLens's name; it is no test
    prompt: str,
    answer: str | Sequence[str],
    model: Any,
    prepend_space_to_answer: bool = True,
    print_details: bool = True,
    prepend_bos: bool | None = None,
    top_k: int = 10,
) -> None:
    """Prints how well ``model`` completes ``prompt``: ``model.test_prompt``, with TransformerLens's arguments."""
    model.test_prompt(prompt, answer, prepend_space_to_answer, print_details, prepend_bos, top_k)


test_prompt.__test__ = False  # type: ignore[attr-defined]  # or pytest takes it for a test where it is imported
