"""The methods of HookedTransformer that are about next tokens: generation, and the loss of logits."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Generic, cast

import numpy as np

from graphlens.analysis import numerics
from graphlens.analysis.arrays import ArrayInput, ArrayT, UserArray
from graphlens.errors import InputError, checked_number, is_one_of, warn
from graphlens.model.generate import Generation, Options, gathered, holds_text
from graphlens.model.text import Input, Tokens

if TYPE_CHECKING:
    from graphlens.model.runner import Runner

_RETURN_TYPES = ("input", "str", "tokens", "embeds")


class GenerateMethods(Generic[ArrayT]):
    """The part of HookedTransformer that generates, and says how well next tokens were foreseen."""

    runner: Runner[ArrayT]

    def loss_fn(
        self, logits: ArrayT, tokens: ArrayInput, attention_mask: ArrayInput | None = None, per_token: bool = False
    ) -> ArrayT:
        """The next-token loss of logits, as ``forward`` computes it. TransformerLens: the same name.

        Args:
            logits: Float [b, p, V].
            tokens: The token ids that ran, int [b, p].
            attention_mask: Int [b, p], 1 at real tokens; None where all are.
            per_token: True gives the loss of each next token instead of their mean.

        Returns:
            In nats, of the logits' dtype: the mean, a scalar; with ``per_token`` [b, p-1], 0 where a mask leaves a token out.

        Raises:
            InputError: For shapes that do not fit, and for a mean over no token at all.
        """
        return numerics.lm_cross_entropy_loss(logits, tokens, attention_mask, per_token)

    def generate(
        self,
        input: Input[ArrayT] = "",
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
        attention_mask: ArrayInput | UserArray | None = None,
        seed: int | None = None,
        repetition_penalty: float = 1.0,
        output_logits: bool = False,
        **unknown: object,
    ) -> str | list[str] | ArrayT:
        """Continues text, tokens or embeddings, with the active hooks and interventions. TransformerLens: the same name.

        With the KV cache, hooks see the whole prompt once and then one position at a time. After its end token a
        sequence goes on with end tokens (of several, the tokenizer's own) until all sequences have ended.

        ``torch.manual_seed`` governs the draws on the torch face, ``numpy.random.seed`` those on the other. With the same
        seed the torch face draws TransformerLens's tokens.

        Args:
            input: Prompts as text, as token ids [b, p] or [p], or as embeddings [b, p, d_model] (before positions are added).
            max_new_tokens: How many tokens to add at most.
            stop_at_eos: Whether an end token ends a sequence.
            eos_token_id: The end token, or several; None for the tokenizer's.
            do_sample: False takes the likeliest token.
            top_k: Draw from that many likeliest tokens; applies before ``top_p``.
            top_p: Draw from the likeliest tokens that reach this probability together.
            temperature: The logits are divided by it; 0 takes the likeliest token.
            freq_penalty: Subtracted from a token's score for each time that it occurred.
            use_past_kv_cache: Whether keys and values are kept between the steps.
            prepend_bos: Whether text gets a BOS token; None for the model's default.
            padding_side: Where PADs at the end of a row of token ids are padding; None for the model's default. In a
                batch of one they never are at its right. Text of different lengths is always padded on the left.
            return_type: "str", "tokens", "embeds", or "input", as the input was.
            verbose: Whether a terminal shows a progress bar.
            attention_mask: int [b, prompt], 1 at real tokens; says exactly what is padding.
            seed: Draws with this seed and leaves that of torch or NumPy alone.
            repetition_penalty: Divides the logits above 0 of tokens that occurred, and multiplies those below. (TransformerLens
                3.9 warns and ignores it here.)
            output_logits: Whether the result is an object with ``sequences`` (token ids) and ``logits`` ([b, V] for each new
                token), transformers' own on the torch face where transformers is installed.
            **unknown: Arguments of transformers' ``generate``; they are ignored with a warning, as there.

        Returns:
            Text without special tokens (a list for several prompts), token ids int64 [b, prompt + new], or embeddings
            [b, prompt + new, d_model]. Text and tokens of prompts that were embeddings are those of the new tokens alone.

        Raises:
            InputError: For unusable input or options, and for a prompt that leaves no room within n_ctx.
        """
        unknown.pop("return_dict_in_generate", None)  # output_logits decides alone, as in TransformerLens
        if unknown:
            warn(f"unsupported generation kwargs are ignored: generate() has no {_named(unknown)}.")
        checked_number(output_logits, "output_logits", bool)
        kind = _output_type(input, return_type)
        options = Options[ArrayT](
            max_new_tokens, stop_at_eos, eos_token_id, do_sample, top_k, top_p, temperature, freq_penalty,
            use_past_kv_cache, prepend_bos, padding_side, verbose, attention_mask, seed, repetition_penalty,
        )  # fmt: skip
        generation, to_user = Generation[ArrayT](self.runner, input, options), self.runner.border.to_user
        all_tokens = np.concatenate(list(generation.chunks(keep_logits=output_logits)), 1)
        if output_logits:
            logits = [to_user(step) for step in generation.logits]
            return cast(ArrayT, self.runner.border.generated(to_user(all_tokens), logits))
        if kind == "tokens":
            return to_user(all_tokens)
        if kind == "embeds":
            return to_user(generation.embedded(all_tokens))
        texts = [self._text(row) for row in all_tokens]
        return texts[0] if len(texts) == 1 else texts

    def generate_stream(
        self,
        input: Input[ArrayT] = "",
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
        attention_mask: ArrayInput | UserArray | None = None,
        seed: int | None = None,
        repetition_penalty: float = 1.0,
    ) -> Iterator[str | ArrayT]:
        """``generate``, handed out as it comes. TransformerLens: the same name.

        The pieces together are what ``generate`` returns as tokens. TransformerLens gives tokens even for
        ``return_type="str"``, and takes an end token that it has generated for padding; here neither is so.

        Args:
            input: Prompts; see ``generate``, as for all arguments that are not here.
            max_tokens_per_yield: How many tokens a piece has at least. The first piece begins with the prompt, which
                counts; the last one has what is left.
            return_type: "tokens" (also for "input"), or "str" for the text of one prompt.

        Yields:
            Token ids int64 [b, n], or text.

        Raises:
            InputError: As ``generate`` does, before anything is yielded.
        """
        checked_number(max_tokens_per_yield, "max_tokens_per_yield", least=1)
        if is_one_of(return_type, ("input", "tensor")):  # TransformerLens's names of what it yields
            return_type = "tokens"
        kind = _output_type(input, return_type)
        if "embeds" in (kind, _output_type(input, "input")):
            raise InputError("a stream gives tokens or text, and its prompts are text or token ids: use generate().")
        as_text = kind == "str"
        if as_text and not isinstance(input, str) and len(cast(Sized, input)) != 1:
            raise InputError("a stream of text has one prompt; ask for return_type='tokens' for several.")
        options = Options[ArrayT](
            max_new_tokens, stop_at_eos, eos_token_id, do_sample, top_k, top_p, temperature, freq_penalty,
            use_past_kv_cache, prepend_bos, padding_side, verbose, attention_mask, seed, repetition_penalty,
        )  # fmt: skip
        generation = Generation[ArrayT](self.runner, input, options)
        return self._stream(gathered(generation.chunks(), max_tokens_per_yield), as_text)

    def _stream(self, pieces: Iterator[Tokens], as_text: bool) -> Iterator[str | ArrayT]:
        said, every = "", np.zeros((1, 0), np.int64)
        for piece in pieces:
            if not as_text:
                yield self.runner.border.to_user(piece)
                continue
            every = np.concatenate([every, piece], 1)
            # A token may hold half a character: what does not decode yet waits for the next piece.
            text = self._text(every[0]).rstrip("\ufffd")
            said, new = text, text[len(said) :]
            if new:
                yield new

    def _text(self, tokens: Tokens) -> str:
        return self.runner.text.need_tokenizer().decode(tokens.tolist(), skip_special_tokens=True)


def _output_type(input: object, return_type: str | None) -> str:
    if not is_one_of(return_type, _RETURN_TYPES):
        raise InputError(f"return_type must be one of {_RETURN_TYPES}, not {return_type!r}.")
    if return_type == "input":
        return "str" if holds_text(input) else "embeds" if len(getattr(input, "shape", ())) == 3 else "tokens"
    return str(return_type)


def _named(unknown: Mapping[str, object]) -> str:
    """The arguments that generate() does not have, each with the one that may have been meant."""
    own = [*Options.__dataclass_fields__, "return_type", "output_logits"]
    near = {name: difflib.get_close_matches(name, own, n=1) for name in unknown}
    return ", ".join(f"{name} (did you mean {near[name][0]}?)" if near[name] else name for name in unknown)
