"""Generating: the loop over tokens, and when it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic

import numpy as np

from graphlens.analysis.arrays import Array, ArrayInput, ArrayT, UserArray
from graphlens.edits.gate import Window
from graphlens.errors import InputError, checked_number
from graphlens.file.io_names import ATTENTION_MASK, INPUT_IDS, RESIDUAL_IN
from graphlens.model.embedding import checked_embeddings, embedded, residual_of
from graphlens.model.kv_cache import KeyValueCache
from graphlens.model.limits import longest
from graphlens.model.request import Request, checked_mask
from graphlens.model.sampling import Sampling
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
    repetition_penalty: float = 1.0

    @property
    def sampling(self) -> Sampling:
        """How each token is chosen."""
        temperature = self.temperature if self.do_sample else 0.0
        return Sampling(self.top_k, self.top_p, temperature, self.freq_penalty, self.repetition_penalty)

    def check(self) -> None:
        """Checks the numbers.

        Raises:
            InputError: For a temperature, ``top_k``, ``top_p``, penalty or number of tokens that cannot be.
        """
        checked_number(self.max_new_tokens, "max_new_tokens", least=0)
        checked_number(self.temperature, "temperature", float, least=0)
        self.sampling.check()
        if self.seed is not None:
            checked_number(self.seed, "seed", least=0)
        for name in ("stop_at_eos", "do_sample", "use_past_kv_cache"):
            checked_number(getattr(self, name), name, bool)


class Generation(Generic[ArrayT]):
    """One generation, checked and ready to go through.

    Args:
        runner: Runs the model.
        input: The prompts: text, token ids, or embeddings [b, p, d_model].
        options: The arguments of ``generate``.

    Attributes:
        embeddings: The embeddings that were given, if any.
        logits: The logits [b, V] of each new token so far, where they are kept.

    Raises:
        InputError: For unusable input or options, and for prompts that leave no room within n_ctx.
    """

    def __init__(self, runner: Runner[ArrayT], input: Input[ArrayT], options: Options[ArrayT]) -> None:
        options.check()
        self._runner, self._options = runner, options
        self._ends, self._fill = self._end_tokens()
        self._choose = runner.border.sampler(options.seed)
        self.embeddings = checked_embeddings(runner, input)
        self.logits: list[Array] = []
        if self.embeddings is None:
            self._prompt, mask = self._prompts(input)
            self._shape = (self._prompt.shape[0], self._prompt.shape[1])
        else:
            self._shape, mask = (self.embeddings.shape[0], self.embeddings.shape[1]), None
            self._prompt = np.zeros((self._shape[0], 0), np.int64)
            if options.freq_penalty or options.repetition_penalty != 1:
                raise InputError(
                    "freq_penalty and repetition_penalty count tokens, which embeddings do not tell: leave them out."
                )
        if options.attention_mask is not None:
            mask = checked_mask(options.attention_mask, self._shape)
        if self.embeddings is not None and mask is not None and not mask.all():
            raise InputError("embeddings cannot be padded: continue prompts of one length, or token ids.")
        cfg = runner.config
        if self._shape[1] + options.max_new_tokens > cfg.n_ctx:
            raise InputError(
                f"a prompt of {self._shape[1]} tokens and {options.max_new_tokens} new ones are too many: "
                f"{longest(cfg)}. Shorten the prompt or lower max_new_tokens."
            )
        self._seen = np.ones(self._shape, np.int64) if mask is None else mask
        if not self._seen[:, -1].all():
            raise InputError(
                "the last token of a prompt is padding: pad prompts on the left to continue them (padding_side='left'), or "
                "say with attention_mask which tokens are padding."
            )

    def chunks(self, keep_logits: bool = False) -> Iterator[Tokens]:
        """The prompts int64 [b, p] (p = 0 for embeddings), then each step's tokens [b, 1].

        Args:
            keep_logits: True puts the logits [b, V] of each new token into ``logits``.
        """
        options, prompt, how = self._options, self._prompt, self._options.sampling
        yield prompt
        tokens, new, seen, began = prompt, prompt, self._seen, self._runner.identity
        whole = True  # what is new is all there is
        finished = np.zeros(len(prompt), bool)
        # Without a cache the tokens are the same: a file that has none runs the whole text at each step.
        cache = self._empty_cache() if options.use_past_kv_cache and self._runner.engine.manifest.keeps_past else None
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
                logits = self._runner.run(self._step(new, cache, seen, whole)).logits[:, -1]
                if keep_logits:
                    self.logits.append(np.array(logits))
                chosen = self._choose(logits, tokens, how)
                if self._ends:
                    chosen = np.where(finished, self._fill, chosen)
                    finished |= np.isin(chosen, self._ends)
                added = chosen[:, None]
                tokens = np.concatenate([tokens, added], 1)
                seen = np.concatenate([seen, np.ones_like(added)], 1)
                whole = cache is None
                short = self._runner.config.rotary_short
                if cache is not None and short is not None and int(seen.sum(-1).max()) == short + 1:
                    cache, whole = self._empty_cache(), True  # all keys are rotated otherwise from here on
                new = tokens if whole else added
                if progress is not None:
                    progress.advance()
                yield added
                if self._ends and finished.all():
                    return

    def embedded(self, tokens: Tokens) -> Array:
        """The embeddings of what was generated, prompt included, without positions.

        Args:
            tokens: What ``chunks`` gave, int64 [b, p].

        Returns:
            [b, p, d_model], the given embeddings before those of the tokens.
        """
        found = embedded(self._runner, tokens)
        return found if self.embeddings is None else np.concatenate([self.embeddings, found], 1)

    def _empty_cache(self) -> KeyValueCache:
        """A cache that knows which of the positions to come are the prompt."""
        cache = KeyValueCache.init_cache(self._runner.config, batch_size=self._shape[0])
        cache.prompt = self._shape[1]
        return cache

    def _step(self, new: Tokens, cache: KeyValueCache | None, seen: Tokens, whole: bool) -> Request:
        """The run over new tokens (all there are, if ``whole``), of which only the logits are read."""
        feeds: dict[str, Any] = {INPUT_IDS: new}
        plan, shape = self._runner.plan(), (new.shape[0], new.shape[1])
        if self.embeddings is not None and whole:
            residual = residual_of(self._runner, self.embedded(new))
            feeds, plan, shape = {RESIDUAL_IN: residual}, replace(plan, start=0), residual.shape[:2]
        part = seen[:, seen.shape[1] - shape[1] :]
        horizon = self._shape[1] + self._options.max_new_tokens
        if cache is None:
            feeds[ATTENTION_MASK] = seen
            window = Window(shape[0], 0, shape[1], horizon, self._shape[1])
        else:
            feeds |= cache.feeds(range(self._runner.config.n_layers), part)
            window = cache.window(shape[1], horizon)
        return Request(
            replace(plan, past=cache is not None), feeds, new, part, part, cache, "", shape, window, bare=True
        )

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
