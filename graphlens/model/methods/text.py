"""The methods of HookedTransformer that turn text into tokens and back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, cast

import numpy as np

from graphlens.analysis import numerics
from graphlens.analysis.arrays import Array, ArrayInput, ArrayT, UserArray
from graphlens.errors import InputError, checked_number, is_one_of
from graphlens.file.tokenizer_parts import checked_text
from graphlens.model.text import Input, Tokens, checked_side, is_text, some

if TYPE_CHECKING:
    from graphlens.file.tokenizer import Tokenizer
    from graphlens.model.hooked_transformer import HookedTransformer
    from graphlens.model.kv_cache import KeyValueCache
    from graphlens.model.runner import Runner


class TextMethods(Generic[ArrayT]):
    """The part of HookedTransformer that turns text into tokens and back."""

    runner: Runner[ArrayT]
    dataset: Sequence[Mapping[str, str]] | None = (
        None  # what ``sample_datapoint`` draws from; TransformerLens: the same name
    )

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None for a model without one, which takes token ids only.

        Where transformers is installed it is one of transformers (imported when this is first asked for), with all that
        they can do; else graphlens's small one, with the methods and arguments that need no transformers. As in
        TransformerLens ``tokenizer(text)`` puts BOS first. What is set on it (``padding_side``, ``pad_token``, added
        tokens) holds for the model too.
        """
        return cast("Tokenizer | None", self.runner.text.exposed)

    @tokenizer.setter
    def tokenizer(self, tokenizer: object) -> None:
        self.runner.text.take(tokenizer, as_it_is=True)

    @tokenizer.deleter
    def tokenizer(self) -> None:
        # As an attribute patched for a while is put back: the tokenizer that the model was opened with.
        self.runner.text.tokenizer = self.runner.text.own_tokenizer

    def set_tokenizer(self, tokenizer: object, default_padding_side: str | None = None) -> None:
        """Replaces the tokenizer. TransformerLens: the same name.

        As there, one of transformers gets EOS for a BOS or PAD that it lacks, and where it does not put BOS before a text, the
        model goes on with a copy that does.

        Args:
            tokenizer: One of transformers, or graphlens's small one, which stays as it is.
            default_padding_side: "right" or "left"; None is the tokenizer's own.

        Raises:
            InputError: For another kind or side.
        """
        side = None if default_padding_side is None else checked_side(default_padding_side)
        text = self.runner.text
        if tokenizer is None:
            raise InputError("set_tokenizer takes a tokenizer. For a model without one: model.tokenizer = None.")
        text.take(tokenizer)
        if side is not None:
            text.default_padding_side = side

    # Text to tokens

    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> ArrayT:
        """Text as token ids. TransformerLens: the same name.

        Args:
            input: One text, or several, the shorter ones padded.
            prepend_bos: Whether they get a BOS token; None for the model's default.
            padding_side: "right" or "left", where shorter ones get PAD; None for the model's default.
            move_to_device: TransformerLens's; changes nothing.
            truncate: Whether they are cut at n_ctx.

        Returns:
            int64 [b, p]; one string gives b = 1. An empty string without BOS is no token, p = 0, which a run refuses.

        Raises:
            InputError: For a model without a tokenizer, and another padding side.
        """
        return self.runner.border.to_user(self.runner.text.padded(input, prepend_bos, truncate, padding_side))

    def to_single_token(self, string: str) -> int:
        """The id of a string that is exactly one token. TransformerLens: the same name.

        Args:
            string: The text, its leading space included.

        Raises:
            InputError: When it is none or several.
        """
        return self.runner.text.single_token(string)

    def get_token_position(
        self,
        single_token: str | int,
        input: Input[ArrayT],
        mode: str = "first",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> int:
        """The position of a token in a prompt. TransformerLens: the same name.

        Args:
            single_token: An id (an array of one will do), or a string that is one token.
            input: A text, or ids [p] or [1, p].
            mode: "first" or "last" occurrence.
            prepend_bos: Whether text gets a BOS token; None for the model's default.
            padding_side: Where text is padded; None for the model's default.

        Raises:
            InputError: When the token is not there, and for several prompts.
        """
        if not is_one_of(mode, ("first", "last")):
            raise InputError(f"mode must be 'first' or 'last', not {mode!r}.")
        text = self.runner.text
        if isinstance(single_token, str):
            token = text.single_token(single_token)
        else:
            one = single_token.reshape(()) if getattr(single_token, "shape", None) == (1,) else single_token  # type: ignore[attr-defined]
            token = checked_number(one, "single_token")
        rows = text.padded(input, prepend_bos, True, padding_side) if is_text(input) else text.ids(input, looking=True)
        if rows.shape[0] != 1:
            raise InputError(f"get_token_position takes one prompt, not {rows.shape[0]}.")
        found = np.flatnonzero(rows[0] == token)
        if found.size == 0:
            known = text.tokenizer is not None and 0 <= token < len(text.tokenizer)
            shown = f" ({text.of_each([token])[0]!r})" if known else ""
            raise InputError(f"token {token}{shown} does not occur in the prompt of {rows.shape[1]} tokens.")
        return int(found[0 if mode == "first" else -1])

    def tokens_to_residual_directions(self, tokens: ArrayInput | UserArray) -> ArrayT:
        """The columns of W_U that tokens are read off with. TransformerLens: the same name.

        These are directions of the residual stream only where the final norm is folded (``fold_ln``).

        Args:
            tokens: An id, a string that is one token, or ids of any shape.

        Returns:
            A copy, [..., d_model] for tokens of shape [...]; a single id in any shape gives [d_model].

        Raises:
            InputError: For ids outside the vocabulary, and strings that are not one token.
        """
        text = self.runner.text
        ids = text.token_ids(text.single_token(tokens) if isinstance(tokens, str) else tokens)
        rows = self.runner.weights["unembed.W_U"].T
        return self.runner.border.to_user(np.array(rows[ids.reshape(()) if ids.size == 1 else ids]))

    # Text or tokens to the residual stream

    def input_to_embed(
        self,
        input: Input[ArrayT],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: ArrayInput | UserArray | None = None,
        past_kv_cache: KeyValueCache | None = None,
    ) -> tuple[ArrayT, ArrayT, None, ArrayT | None]:
        """What a run begins with: the residual stream before block 0, and the tokens. TransformerLens: the same name.

        Hooks at the embeddings are called.

        Args:
            input: As in ``forward``, as all others.
            prepend_bos: See there.
            padding_side: See there.
            attention_mask: See there.
            past_kv_cache: It tells the positions, and is not extended here (in TransformerLens its mask is, without keys).

        Returns:
            (residual [b, p, d_model], tokens int64 [b, p], None, the mask int64 [b, past + p]). The mask is None where prompts
            are padded on the right, and neither a mask nor a cache is given.

        Raises:
            InputError: As ``forward``.
        """
        cache = copy.copy(past_kv_cache)
        options = {"prepend_bos": prepend_bos, "padding_side": padding_side, "attention_mask": attention_mask}
        runner = self.runner
        request = runner.request(input, **options, stop_at_layer=0, past_kv_cache=cache)
        tokens, mask = request.need_tokens(), request.mask
        if mask is None and (cache is not None or (runner.text.tokenizer and runner.text.side(padding_side) == "left")):
            mask = np.ones_like(tokens)
        if mask is not None and past_kv_cache is not None:
            mask = np.concatenate([past_kv_cache.mask, mask], 1)
        to_user = runner.border.to_user
        residual = to_user(cast(Array, runner.run(request).output))
        return residual, to_user(tokens), None, None if mask is None else to_user(mask)

    # Tokens to text

    def to_string(self, tokens: ArrayInput | UserArray) -> str | list[str]:
        """The text of token ids. TransformerLens: the same name.

        Args:
            tokens: One id or ids [p], which give a text; ids [b, p] give a list of texts.

        Raises:
            InputError: For ids that are no tokens.
        """
        tokenizer, ids = self.runner.text.need_tokenizer(), self.runner.text.token_ids(tokens, decoding=True)
        if ids.ndim > 2:
            raise InputError(f"tokens must have shape [batch, pos] or [pos], not {list(ids.shape)}.")
        if ids.ndim == 2:
            return [tokenizer.decode(row) for row in ids.tolist()]
        return tokenizer.decode(np.atleast_1d(ids).tolist())

    def to_str_tokens(
        self, input: Input[ArrayT], prepend_bos: bool | None = None, padding_side: str | None = None
    ) -> list[str] | list[list[str]]:
        """The text of each token. TransformerLens: the same name.

        Args:
            input: A string or ids [p], which give a list; a list of either, or ids [b, p], gives a list of lists. Strings
                are cut at n_ctx and not padded.
            prepend_bos: Whether text gets a BOS token; None for the model's default.
            padding_side: TransformerLens's; checked, and changes nothing.

        Raises:
            InputError: For ids that are no tokens.
        """
        text = self.runner.text
        checked_side("right" if padding_side is None else padding_side)
        if isinstance(input, str):
            return text.of_each(text.encode(input, prepend_bos, truncate=True))
        if isinstance(input, (list, tuple)) and any(map(_is_several, input)):
            rows = [self.to_str_tokens(cast("Input[ArrayT]", each), prepend_bos) for each in input]
            return cast(list[list[str]], rows)
        ids = text.token_ids(input, decoding=True)
        if ids.ndim == 2 and ids.shape[0] > 1:
            return [text.of_each(row) for row in ids.tolist()]
        if ids.ndim > 2 and ids.size != ids.shape[-1]:
            raise InputError(f"tokens must have shape [batch, pos] or [pos], not {list(ids.shape)}.")
        return text.of_each(ids.reshape(-1).tolist())

    def to_single_str_token(self, int_token: int) -> str:
        """The text of one token id. TransformerLens: the same name.

        Args:
            int_token: The id; an array of one will do.

        Raises:
            InputError: For an id outside the vocabulary.
        """
        ids = self.runner.text.token_ids(int_token, decoding=True)
        if ids.size != 1:
            raise InputError(f"to_single_str_token takes one token id, not {ids.size}.")
        return self.runner.text.of_each(ids.reshape(-1).tolist())[0]

    # A look at a prompt

    def sample_datapoint(
        self, tokenize: bool = False, prepend_bos: bool | None = None, padding_side: str | None = None
    ) -> str | ArrayT:
        """One text of ``model.dataset``, drawn by ``numpy.random``. TransformerLens: the same name.

        Args:
            tokenize: Whether it comes as token ids [1, p].
            prepend_bos: Whether these get a BOS token; None for the model's default.
            padding_side: TransformerLens's; checked, and changes nothing.

        Raises:
            InputError: Where there is no data set: TransformerLens downloads one, graphlens does not.
        """
        if not self.dataset:
            raise InputError(
                'there is no data set: set model.dataset = [{"text": "..."}, ...], a Hugging Face one, say.'
            )
        text = self.dataset[int(np.random.randint(0, len(self.dataset)))]["text"]
        return self.to_tokens(text, prepend_bos, padding_side) if tokenize else text

    def test_prompt(
        self,
        prompt: str,
        answer: str | Sequence[str],
        prepend_space_to_answer: bool = True,
        print_details: bool = True,
        prepend_bos: bool | None = None,
        top_k: int = 10,
    ) -> None:
        """Prints how well the model completes a prompt, with what is active. TransformerLens: the same name.

        Each answer token's rank, logit (its unit) and probability, and the likeliest tokens in its place.

        Args:
            prompt: The prompt.
            answer: The right answer; several are compared by their first tokens.
            prepend_space_to_answer: Whether answers get the space that they lack.
            print_details: False prints the ranks alone.
            prepend_bos: Whether the prompt gets a BOS token; None for the model's default.
            top_k: How many of the likeliest tokens to print.

        Raises:
            InputError: For an empty answer or a prompt too long.
        """
        text = self.runner.text
        single = isinstance(answer, (str, bytes)) or not isinstance(answer, Iterable)
        answers = [checked_text(each) for each in ([answer] if single else answer)]
        top_k = checked_number(top_k, "top_k", least=0)
        shown = top_k if checked_number(print_details, "print_details", bool) else None
        if checked_number(prepend_space_to_answer, "prepend_space_to_answer", bool):
            answers = [each if each.startswith(" ") else f" {each}" for each in answers]
        rows = [text.need_tokenizer().encode(each, add_special_tokens=False) for each in answers]
        if not rows or not all(rows):
            raise InputError(f"every answer needs at least one token; got {answers}.")
        wanted = np.asarray([row[:1] for row in rows] if len(rows) > 1 else rows, np.int64)  # [answers, answer tokens]
        start = np.asarray([some([text.encode(prompt, prepend_bos, truncate=False)])[0]], np.int64)
        tokens = np.concatenate([start.repeat(len(wanted), 0), wanted], axis=1)
        border, model = self.runner.border, cast(Any, self)  # forward is HookedTransformer's
        logits = border.from_user(model.forward(border.to_user(tokens)))[:, start.shape[1] - 1 : -1].astype(np.float32)
        _print_completions(text.of_each, start[0], wanted, logits, shown)


def _is_several(item: object) -> bool:
    """True for a text, and for a row of ids."""
    return isinstance(item, (str, list, tuple)) or bool(getattr(item, "ndim", 0))


def _print_completions(
    of_each: Callable[[Sequence[int]], list[str]], prompt: Tokens, wanted: Tokens, logits: Array, top_k: int | None
) -> None:
    """Prints ``test_prompt``'s findings: wanted [answers, a], logits [answers, a, V]; ``top_k`` None for ranks alone."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)

    def line(logit: float, probability: float, token: str) -> str:
        return escape(f"Logit: {logit:6.2f}  Prob: {probability:7.2%}  Token: {token!r}")

    answers = [of_each(row) for row in wanted.tolist()]
    if top_k is not None:
        console.print(escape(f"Prompt tokens: {of_each(prompt.tolist())}"))
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
            shown = line(here[0, token], probabilities[0, token], of_each([token])[0])
            console.print(f"Top {place:<7} {shown}")
    found = ranks if len(answers) > 1 else [row[0] for row in ranks]
    console.print(f"[b]Ranks of the answer tokens:[/b] {escape(str(found))}")


def test_prompt(
    prompt: str,
    answer: str | Sequence[str],
    model: HookedTransformer[Any],
    prepend_space_to_answer: bool = True,
    print_details: bool = True,
    prepend_bos: bool | None = None,
    top_k: int = 10,
) -> None:
    """Prints how well a model completes a prompt. TransformerLens: ``utils.test_prompt``.

    Args:
        prompt: See ``HookedTransformer.test_prompt``, as for all but the model.
        answer: See there.
        model: The model.
        prepend_space_to_answer: See there.
        print_details: See there.
        prepend_bos: See there.
        top_k: See there.

    Raises:
        InputError: For an empty answer or a prompt too long.
    """
    model.test_prompt(prompt, answer, prepend_space_to_answer, print_details, prepend_bos, top_k)


test_prompt.__test__ = False  # type: ignore[attr-defined]  # or pytest takes it for a test where it is imported
