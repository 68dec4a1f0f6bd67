"""Generating text: the loop over tokens, its sampling, and its stopping, on a model with a KV cache."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens.analysis.numerics import softmax
from graphlens.edits.gate import Window
from graphlens.errors import InputError
from graphlens.model.active import InterventionMethods
from graphlens.model.hooks import HookRegistry
from graphlens.model.kv_cache import KeyValueCache
from graphlens.views.progress import steps

Array = npt.NDArray[Any]
Tokens = npt.NDArray[np.int64]
_RETURN_TYPES = ("input", "str", "tokens")


@dataclass(frozen=True)
class _Options:
    """The arguments of generate, by its names."""

    max_new_tokens: int
    stop_at_eos: bool
    eos_token_id: int | Sequence[int] | None
    do_sample: bool
    top_k: int | None
    top_p: float | None
    temperature: float
    freq_penalty: float
    use_past_kv_cache: bool
    prepend_bos: bool | None
    padding_side: str | None
    verbose: bool
    attention_mask: Any
    seed: int | None


def sample(
    logits: Array,
    tokens: Tokens,
    rng: np.random.Generator,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    freq_penalty: float = 0.0,
) -> Tokens:
    """One token per row of ``logits`` [b, V]: int64 [b]. ``tokens`` int [b, p] are those so far, for the penalty.

    In this order: divide by ``temperature`` (0 is greedy), subtract ``freq_penalty`` times each token's count, keep the
    ``top_k`` likeliest, of those the likeliest that reach ``top_p``. TransformerLens: ``sample_logits``.
    """
    if temperature == 0:
        return np.asarray(logits.argmax(-1), np.int64)
    scores = logits.astype(np.float64) / temperature
    if freq_penalty:
        for row, seen in zip(scores, tokens, strict=True):
            row -= freq_penalty * np.bincount(seen, minlength=row.size)
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


class GenerationMethods(InterventionMethods):
    """The part of HookedTransformer that generates."""

    _hooks: HookRegistry

    def generate(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        return_type: str | None = "input",
        verbose: bool = True,
        attention_mask: Any = None,
        seed: int | None = None,
    ) -> Any:
        """Continues text or tokens by up to ``max_new_tokens`` tokens, with the active hooks.

        Prompts of different lengths are padded on the left, whatever ``padding_side`` says. For token ids it says, or the
        model's default does, where PADs at the end of a row are padding; in a batch of one they never are at its right.
        ``attention_mask`` int [b, prompt] says so exactly. After its end token (with several: the tokenizer's own) a
        sequence goes on with end tokens until all have ended.
        ``do_sample=False`` or ``temperature=0`` takes the likeliest token; ``top_k`` applies before
        ``top_p``. With the KV cache, hooks see the whole prompt once and then one position at a time.
        ``return_type``: "str", "tokens" (int64 [b, prompt + new]), or "input", as the input was; text has no special
        tokens. ``seed`` makes the draws repeatable. ``verbose`` shows a progress bar on a terminal.
        Raises InputError for unusable input or options, and for a prompt that leaves no room within n_ctx.
        """
        options = _Options(
            max_new_tokens, stop_at_eos, eos_token_id, do_sample, top_k, top_p, temperature, freq_penalty,
            use_past_kv_cache, prepend_bos, padding_side, verbose, attention_mask, seed,
        )  # fmt: skip
        all_tokens = np.concatenate(list(self._chunks(input, options)), 1)
        if self._output_type(input, return_type) == "tokens":
            return self._to_user(all_tokens)
        texts = [self._text(row) for row in all_tokens]
        return texts[0] if len(texts) == 1 else texts

    def generate_stream(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        max_tokens_per_yield: int = 25,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        return_type: str | None = "input",
        verbose: bool = True,
        attention_mask: Any = None,
        seed: int | None = None,
    ) -> Iterator[Any]:
        """``generate``, handed out as it comes, as tokens [b, n] of at least ``max_tokens_per_yield``: first the prompt,
        which counts, with what follows it, then new ones. The last piece has what is left.

        The pieces together are what ``generate`` returns as tokens. As in TransformerLens, text gives tokens too;
        TransformerLens does so even for ``return_type="str"``, which here gives text (of one prompt), and takes an end
        token that it has generated for padding, which generate does not. Raises InputError as generate does, before
        anything is yielded.
        """
        if max_tokens_per_yield < 1:
            raise InputError(f"max_tokens_per_yield must be at least 1, not {max_tokens_per_yield}.")
        options = _Options(
            max_new_tokens, stop_at_eos, eos_token_id, do_sample, top_k, top_p, temperature, freq_penalty,
            use_past_kv_cache, prepend_bos, padding_side, verbose, attention_mask, seed,
        )  # fmt: skip
        if return_type in ("input", "tensor"):  # TransformerLens's names of what it yields
            return_type = "tokens"
        as_text = self._output_type(input, return_type) == "str"
        if as_text and not isinstance(input, str) and len(input) != 1:
            raise InputError("a stream of text has one prompt; ask for return_type='tokens' for several.")
        return self._stream(self._chunks(input, options), max_tokens_per_yield, as_text)

    def _stream(self, chunks: Iterator[Tokens], size: int, as_text: bool) -> Iterator[Any]:
        said, every = "", np.zeros((1, 0), np.int64)
        for piece in _gathered(chunks, size):
            if not as_text:
                yield self._to_user(piece)
                continue
            every = np.concatenate([every, piece], 1)
            # A token may hold half a character: what does not decode yet waits for the next piece.
            text = self._text(every[0]).rstrip("\ufffd")
            said, new = text, text[len(said) :]
            if new:
                yield new

    def _text(self, tokens: Tokens) -> str:
        tokenizer = self._need_tokenizer()
        return str(tokenizer.fast.decode(tokens.tolist(), skip_special_tokens=True))

    def _output_type(self, input: Any, return_type: str | None) -> str:
        if return_type not in _RETURN_TYPES:
            raise InputError(f"return_type must be one of {_RETURN_TYPES}, not {return_type!r}.")
        if return_type != "input":
            return return_type
        text = isinstance(input, str) or (isinstance(input, (list, tuple)) and any(isinstance(i, str) for i in input))
        return "str" if text else "tokens"

    def _ends(self, stop_at_eos: bool, eos_token_id: int | Sequence[int] | None) -> tuple[list[int], int]:
        """The ids that end a sequence, and the one that fills it up: of several the tokenizer's own, if it has one."""
        own = None if self.tokenizer is None else self.tokenizer.eos_token_id
        if not stop_at_eos:
            return [], 0
        if eos_token_id is None:
            if own is None:
                raise InputError("this model has no end token: pass eos_token_id=, or stop_at_eos=False.")
            return [own], own
        if np.ndim(eos_token_id) == 0:
            return [int(eos_token_id)], int(eos_token_id)  # type: ignore[arg-type]
        ends = [int(i) for i in eos_token_id]  # type: ignore[union-attr]
        if not ends:
            raise InputError("eos_token_id is an empty list: pass an id, or stop_at_eos=False.")
        return ends, ends[0] if own is None else own

    def _chunks(self, input: Any, options: _Options) -> Iterator[Tokens]:
        """Checks everything, then hands out the prompt [b, p] and each step's tokens [b, 1]."""
        max_new_tokens, temperature = options.max_new_tokens, options.temperature
        top_k, top_p = options.top_k, options.top_p
        ends, fill = self._ends(options.stop_at_eos, options.eos_token_id)
        if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
            raise InputError(f"temperature >= 0, top_k >= 1, 0 < top_p <= 1: not {temperature}, {top_k}, {top_p}.")
        if max_new_tokens < 0:
            raise InputError(f"max_new_tokens={max_new_tokens} is less than none.")
        prompt, mask = self._prompt(input, options.prepend_bos, self._side(options.padding_side))
        if options.attention_mask is not None:
            mask = self._checked_mask(options.attention_mask, (prompt.shape[0], prompt.shape[1]))
        cfg = self._engine.manifest.config
        if prompt.shape[1] + max_new_tokens > cfg.n_ctx:
            raise InputError(
                f"a prompt of {prompt.shape[1]} tokens and {max_new_tokens} new ones are more than {cfg.model_name} takes: "
                f"{cfg.n_ctx} (n_ctx). Shorten the prompt or lower max_new_tokens."
            )
        seen = np.ones_like(prompt) if mask is None else mask
        if not seen[:, -1].all():
            raise InputError(
                "the last token of a prompt is padding: pad prompts on the left to continue them (padding_side='left'), or "
                "say with attention_mask which tokens are padding."
            )
        rng = np.random.default_rng(options.seed)
        greedy = 0.0 if not options.do_sample else temperature

        def choose(logits: Array, tokens: Tokens) -> Tokens:
            return sample(logits, tokens, rng, top_k, top_p, greedy, options.freq_penalty)

        def loop() -> Iterator[Tokens]:
            yield prompt
            tokens, new, whole = prompt, prompt, seen
            finished = np.zeros(len(prompt), bool)
            cache = KeyValueCache.init_cache(cfg, batch_size=len(prompt)) if options.use_past_kv_cache else None
            bar = (
                steps("Generating", max_new_tokens) if options.verbose and max_new_tokens else contextlib.nullcontext()
            )
            with bar as progress:
                for _ in range(max_new_tokens):
                    logits = self._last_logits(new, cache, whole, prompt.shape[1], max_new_tokens)
                    chosen = choose(logits, tokens)
                    if ends:
                        chosen = np.where(finished, fill, chosen)
                        finished |= np.isin(chosen, ends)
                    added = chosen[:, None]
                    tokens = np.concatenate([tokens, added], 1)
                    whole = np.concatenate([whole, np.ones_like(added)], 1)
                    new = added if options.use_past_kv_cache else tokens
                    if progress is not None:
                        progress.advance()
                    yield added
                    if ends and finished.all():
                        return

        return loop()

    def _prompt(self, input: Any, prepend_bos: bool | None, side: str) -> tuple[Tokens, Tokens | None]:
        """The prompts int64 [b, p], and their mask where there is padding. Text too long is an error: nothing could
        follow it."""
        if self._output_type(input, "input") == "str":
            return self._tokens_and_mask(input, prepend_bos, "left", truncate=False)
        prompt, mask = self._tokens_and_mask(input, prepend_bos, side, followed=True)
        # One row has no longer one to be padded to: its end tokens are part of it.
        return prompt, None if len(prompt) == 1 and side == "right" else mask

    def _last_logits(
        self, new: Tokens, cache: KeyValueCache | None, mask: Tokens, prompt: int, max_new_tokens: int
    ) -> Array:
        """Logits [b, V] after the last token, with the active edits; ``new`` is all tokens where there is no cache."""
        plan = replace(self._plan(), past=cache is not None)
        names: Collection[str] = set(self._engine.names(plan))
        callbacks = self._hooks.callbacks(self._to_user, self._from_user, names)
        feeds: dict[str, Any] = {"input_ids": new}
        part = mask[:, mask.shape[1] - new.shape[1] :]
        if cache is None:
            feeds["attention_mask"] = mask
        else:
            feeds |= cache.feeds(range(self._engine.manifest.config.n_layers), part)
        window = Window(
            new.shape[0], 0 if cache is None else cache.length, new.shape[1], prompt + max_new_tokens, prompt
        )
        plan, edits = self._edits(plan, window)
        # Without hooks nothing inside has to be an output, and more of the graph can be fused.
        plan = plan if callbacks else replace(plan, bare=True)
        results = self._engine.run(feeds, (), callbacks, plan=plan, edits=edits)
        if cache is not None:
            cache.extend(results.present, part)
        assert results.output is not None
        return results.output[:, -1]


def _gathered(chunks: Iterator[Tokens], size: int) -> Iterator[Tokens]:
    """The prompt with so many tokens that they are ``size`` together, at least one, then ``size`` tokens at a time.
    Nothing where no token follows the prompt: TransformerLens's boundaries."""
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
