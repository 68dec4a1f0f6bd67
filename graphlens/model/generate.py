"""Generating: the loop over tokens, how each is drawn, and when the loop ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic

import numpy as np

from graphlens.analysis.arrays import Array, ArrayInput, ArrayT, UserArray
from graphlens.analysis.numerics import softmax
from graphlens.edits.gate import Window
from graphlens.errors import InputError, checked_number
from graphlens.file.io_names import ATTENTION_MASK, INPUT_IDS
from graphlens.model.kv_cache import KeyValueCache
from graphlens.model.limits import longest
from graphlens.model.request import Request, checked_mask
from graphlens.model.text import Input, Tokens
from graphlens.views.progress import steps

if TYPE_CHECKING:
    from graphlens.model.runner import Runner


@dataclass(frozen=True)
class Options(Generic[ArrayT]):
    """The arguments of ``generate``, by its names; see there."""

    max_new_tokens: int = 10
    stop_at_eos: bool = True
    eos_token_id: int | Sequence[int] | None = None
    do_sample: bool = True
    top_k: int | None = None
    top_p: float | None = None
    temperature: float = 1.0
    freq_penalty: float = 0.0
    use_past_kv_cache: bool = True
    prepend_bos: bool | None = None
    padding_side: str | None = None
    verbose: bool = True
    attention_mask: ArrayInput | UserArray | None = None
    seed: int | None = None

    def check(self) -> None:
        """Checks the numbers.

        Raises:
            InputError: For a temperature, ``top_k``, ``top_p`` or number of tokens that cannot be.
        """
        checked_number(self.max_new_tokens, "max_new_tokens", least=0)
        checked_number(self.temperature, "temperature", float, least=0)
        checked_number(self.freq_penalty, "freq_penalty", float)
        if self.top_k is not None:
            checked_number(self.top_k, "top_k", least=1)
        if self.top_p is not None and not checked_number(self.top_p, "top_p", float, most=1) > 0:
            raise InputError(f"top_p={self.top_p!r}: top_p must be more than 0.")
        if self.seed is not None:
            checked_number(self.seed, "seed", least=0)
        for name in ("stop_at_eos", "do_sample", "use_past_kv_cache"):
            checked_number(getattr(self, name), name, bool)


def sample(
    logits: Array,
    tokens: Tokens,
    rng: np.random.Generator,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    freq_penalty: float = 0.0,
) -> Tokens:
    """Draws one token for each row of logits. TransformerLens: ``sample_logits``.

    In this order: divide by ``temperature``, subtract ``freq_penalty`` times each token's count, keep the ``top_k``
    likeliest, of those the likeliest that reach ``top_p``.

    Args:
        logits: [b, V].
        tokens: int [b, p], those so far, for the penalty.
        rng: Where the draws come from.
        top_k: See above; None for all.
        top_p: See above; None for all.
        temperature: 0 takes the likeliest token.
        freq_penalty: See above.

    Returns:
        int64 [b].
    """
    if temperature == 0:
        return np.asarray(logits.argmax(-1), np.int64)
    scores = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # of a tiny temperature: all but the likeliest token become -inf, as they should
        scores = (scores - scores.max(-1, keepdims=True)) / temperature
    if freq_penalty:
        for row, seen in zip(scores, tokens, strict=True):
            row -= float(freq_penalty) * np.bincount(seen, minlength=row.size)
    if top_k is not None and top_k < scores.shape[-1]:
        least = np.partition(scores, -top_k, axis=-1)[:, -top_k, None]
        scores = np.where(scores < least, -np.inf, scores)
    if top_p is not None and top_p < 1:
        order = np.argsort(-scores, axis=-1, kind="stable")
        ordered = np.take_along_axis(softmax(scores), order, -1)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses top_p is kept
        drop = np.zeros_like(beyond)
        np.put_along_axis(drop, order, beyond, -1)
        scores = np.where(drop, -np.inf, scores)
    # The largest of scores + Gumbel noise is a draw from their softmax.
    return np.asarray((scores + rng.gumbel(size=scores.shape)).argmax(-1), np.int64)


class Generation(Generic[ArrayT]):
    """One generation, checked and ready to go through.

    Args:
        runner: Runs the model.
        input: The prompts.
        options: The arguments of ``generate``.

    Raises:
        InputError: For unusable input or options, and for prompts that leave no room within n_ctx.
    """

    def __init__(self, runner: Runner[ArrayT], input: Input[ArrayT], options: Options[ArrayT]) -> None:
        options.check()
        self._runner, self._options = runner, options
        self._ends, self._fill = self._end_tokens()
        self._rng = np.random.default_rng(options.seed)
        self._prompt, mask = self._prompts(input)
        if options.attention_mask is not None:
            mask = checked_mask(options.attention_mask, (self._prompt.shape[0], self._prompt.shape[1]))
        cfg = runner.config
        if self._prompt.shape[1] + options.max_new_tokens > cfg.n_ctx:
            raise InputError(
                f"a prompt of {self._prompt.shape[1]} tokens and {options.max_new_tokens} new ones are too many: "
                f"{longest(cfg)}. Shorten the prompt or lower max_new_tokens."
            )
        self._seen = np.ones_like(self._prompt) if mask is None else mask
        if not self._seen[:, -1].all():
            raise InputError(
                "the last token of a prompt is padding: pad prompts on the left to continue them (padding_side='left'), or "
                "say with attention_mask which tokens are padding."
            )

    def chunks(self) -> Iterator[Tokens]:
        """The prompts int64 [b, p], then each step's tokens [b, 1]."""
        options, prompt = self._options, self._prompt
        temperature = options.temperature if options.do_sample else 0.0
        yield prompt
        tokens, new, seen, began = prompt, prompt, self._seen, self._runner.identity
        finished = np.zeros(len(prompt), bool)
        cache = self._empty_cache() if options.use_past_kv_cache else None
        bar = (
            steps("Generating", options.max_new_tokens)
            if options.verbose and options.max_new_tokens
            else contextlib.nullcontext()
        )
        with bar as progress:
            for _ in range(options.max_new_tokens):
                if self._runner.identity != began:
                    raise InputError(
                        "the model's weights were set while it generated: what it has generated so far is of the weights of "
                        "before. Generate anew."
                    )
                logits = self._runner.run(self._step(new, cache, seen)).logits[:, -1]
                chosen = sample(
                    logits, tokens, self._rng, options.top_k, options.top_p, temperature, options.freq_penalty
                )
                if self._ends:
                    chosen = np.where(finished, self._fill, chosen)
                    finished |= np.isin(chosen, self._ends)
                added = chosen[:, None]
                tokens = np.concatenate([tokens, added], 1)
                seen = np.concatenate([seen, np.ones_like(added)], 1)
                new = tokens if cache is None else added
                short = self._runner.config.rotary_short
                if cache is not None and short is not None and int(seen.sum(-1).max()) == short + 1:
                    cache, new = self._empty_cache(), tokens  # all keys are rotated otherwise from here on
                if progress is not None:
                    progress.advance()
                yield added
                if self._ends and finished.all():
                    return

    def _empty_cache(self) -> KeyValueCache:
        """A cache that knows which of the positions to come are the prompt."""
        cache = KeyValueCache.init_cache(self._runner.config, batch_size=len(self._prompt))
        cache.prompt = self._prompt.shape[1]
        return cache

    def _step(self, new: Tokens, cache: KeyValueCache | None, seen: Tokens) -> Request:
        """The run over new tokens (all of them where there is no cache), of which only the logits are read."""
        shape = (new.shape[0], new.shape[1])
        part = seen[:, seen.shape[1] - new.shape[1] :]
        prompt = self._prompt.shape[1]
        horizon = prompt + self._options.max_new_tokens
        feeds: dict[str, Any] = {INPUT_IDS: new}
        if cache is None:
            feeds[ATTENTION_MASK] = seen
            window = Window(shape[0], 0, shape[1], horizon, prompt)
        else:
            feeds |= cache.feeds(range(self._runner.config.n_layers), part)
            window = cache.window(shape[1], horizon)
        plan = replace(self._runner.plan(), past=cache is not None)
        return Request(plan, feeds, new, part, part, cache, "", shape, window, bare=True)

    def _end_tokens(self) -> tuple[list[int], int]:
        """The ids that end a sequence, and the one that fills it up: of several the tokenizer's own, if it has one."""
        tokenizer, eos_token_id = self._runner.text.tokenizer, self._options.eos_token_id
        own = None if tokenizer is None else tokenizer.eos_token_id
        if not self._options.stop_at_eos:
            return [], 0
        if eos_token_id is None:
            if own is None:
                raise InputError("this model has no end token: pass eos_token_id=, or stop_at_eos=False.")
            return [own], own
        if not isinstance(eos_token_id, list | tuple) and getattr(eos_token_id, "ndim", 0) == 0:
            end = checked_number(eos_token_id, "eos_token_id", least=0)
            return [end], end
        ends = [checked_number(token, "eos_token_id", least=0) for token in eos_token_id]  # type: ignore[union-attr]
        if not ends:
            raise InputError("eos_token_id is an empty list: pass an id, or stop_at_eos=False.")
        return ends, ends[0] if own is None else own

    def _prompts(self, input: Input[ArrayT]) -> tuple[Tokens, Tokens | None]:
        """The prompts int64 [b, p], and their mask where there is padding. Text too long is an error: nothing could
        follow it."""
        text, options = self._runner.text, self._options
        side = text.side(options.padding_side)
        if holds_text(input):
            return text.tokens_and_mask(input, options.prepend_bos, "left", truncate=False)[:2]
        prompt, mask, _ = text.tokens_and_mask(input, options.prepend_bos, side, followed=True)
        # Nothing is longer than a single row, so PADs at its end are no padding but part of it.
        return prompt, None if len(prompt) == 1 and side == "right" else mask


def holds_text(input: object) -> bool:
    """True for a string, and for a list that holds one."""
    return isinstance(input, str) or (isinstance(input, (list, tuple)) and any(isinstance(item, str) for item in input))


def gathered(chunks: Iterator[Tokens], size: int) -> Iterator[Tokens]:
    """Joins single tokens to pieces of at least ``size`` tokens, as TransformerLens's ``generate_stream`` does.

    Args:
        chunks: The prompts [b, p], then each step's tokens [b, 1].
        size: How many tokens a piece has at least. The last piece has what is left.

    Yields:
        int64 [b, n]. The first piece is the prompt, which counts, and one generated token at least. Nothing if no token
        follows the prompt.
    """
    held: list[Tokens] = [next(chunks)]
    fresh = False
    for chunk in chunks:
        held.append(chunk)
        fresh = True
        if sum(piece.shape[1] for piece in held) >= size:
            yield np.concatenate(held, 1)
            held, fresh = [], False
    if fresh:
        yield np.concatenate(held, 1)
