"""What TransformerLens computes from logits, on tensors: the next-token loss with its gradient, sampling, a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from graphlens.errors import InputError, checked_number
from graphlens.views.wording import view_package

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]
    from transformers import PreTrainedTokenizerBase


def lm_cross_entropy_loss(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    per_token: bool = False,
) -> torch.Tensor:
    """Cross-entropy of each next token, in nats, through which gradients pass.

    Args:
        logits: float [b, p, V].
        tokens: int [b, p].
        attention_mask: int or bool [b, p], 0 at padding; a pair of neighbours with a 0 in it counts for nothing.
        per_token: The loss of each next token instead of their mean.

    Returns:
        A scalar, the mean over the pairs that count; with ``per_token`` [b, p-1], 0 at pairs that do not count.

    Raises:
        InputError: For a mask of another shape than the tokens'.
    """
    scores = functional.log_softmax(logits, dim=-1)
    found = scores[..., :-1, :].gather(dim=-1, index=tokens[..., 1:, None].to(scores.device))[..., 0]
    count = int(found.numel())
    if attention_mask is not None:
        if attention_mask.shape != tokens.shape:
            raise InputError(
                f"attention_mask has shape {list(attention_mask.shape)}; the tokens have {list(tokens.shape)}."
            )
        counted = torch.logical_and(attention_mask[..., :-1], attention_mask[..., 1:])
        found = found.masked_fill(~counted, 0.0)
        count = int(counted.sum())
    return -found if per_token else -found.sum() / count


def lm_accuracy(logits: torch.Tensor, tokens: torch.Tensor, per_token: bool = False) -> torch.Tensor:
    """How often the top logit is the next token.

    Args:
        logits: float [b, p, V].
        tokens: int [b, p].
        per_token: Whether each next token was the top one, instead of how often.

    Returns:
        A float32 fraction; bool [b, p-1] with ``per_token``.
    """
    correct = logits.argmax(dim=-1)[:, :-1] == tokens[:, 1:]
    return correct if per_token else correct.sum() / correct.numel()


def sample_logits(
    final_logits: torch.Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    freq_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draws one token for each row of logits, by torch's random numbers: ``torch.manual_seed`` makes it repeatable.

    In this order: divide by ``repetition_penalty`` what was there before, divide by ``temperature``, subtract
    ``freq_penalty`` times each token's count, keep the ``top_k`` likeliest, or else the likeliest that reach ``top_p``. The
    logits that were handed in stay as they are.

    Args:
        final_logits: float [b, V].
        top_k: How many tokens are left to draw from; None for all. With it ``top_p`` counts for nothing, as in
            TransformerLens.
        top_p: How much probability is left to draw from, in (0, 1]; None for all.
        temperature: 0 takes the likeliest token, after ``repetition_penalty`` alone.
        freq_penalty: See above; it needs ``tokens``.
        repetition_penalty: What logits of tokens in ``tokens`` are divided by, or multiplied by where they are negative.
        tokens: int [b, p], those so far.

    Returns:
        int64 [b].

    Raises:
        InputError: For a ``top_k`` or ``top_p`` that cannot be, and a penalty without tokens [b, p].
    """
    if repetition_penalty != 1.0 and tokens is not None:
        final_logits = _less_repeated(final_logits, tokens, repetition_penalty)
    if temperature == 0.0:
        return final_logits.argmax(dim=-1)
    scores = final_logits / temperature
    if freq_penalty > 0:
        if tokens is None or tokens.ndim != 2:
            raise InputError("freq_penalty counts tokens: pass tokens=, the ids [batch, pos] so far.")
        counts = torch.stack([torch.bincount(row, minlength=scores.shape[-1]) for row in tokens])
        scores = scores - freq_penalty * counts.to(scores.device)
    if top_k is not None:
        size = min(checked_number(top_k, "top_k", least=1), scores.shape[-1])
        least = scores.topk(size, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    elif top_p is not None:
        if not checked_number(top_p, "top_p", float, most=1) > 0:
            raise InputError(f"top_p={top_p!r}: top_p must be more than 0.")
        ordered, order = torch.sort(scores, descending=True)
        beyond = ordered.softmax(dim=-1).cumsum(dim=-1) > top_p
        # The token that crosses top_p is kept: what is dropped begins after it.
        beyond = functional.pad(beyond[..., :-1], (1, 0), value=False)
        scores = scores.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return torch.distributions.Categorical(logits=scores.float()).sample()


def _less_repeated(logits: torch.Tensor, tokens: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits in which the tokens that were there before are less likely."""
    there = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, tokens.to(logits.device), True)
    return torch.where(there, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def logits_to_df(
    logits: torch.Tensor, tokenizer: PreTrainedTokenizerBase | None = None, top_k: int | None = None
) -> pd.DataFrame:
    """The logits of one position as a table, the likeliest token first.

    Args:
        logits: float [V].
        tokenizer: What decodes ids; None leaves the tokens' text out.
        top_k: How many rows; None for all.

    Returns:
        A pandas DataFrame with token_index, token_string (with a tokenizer), logit, log_prob and probability.

    Raises:
        RuntimeUnavailable: Without pandas.
    """
    pandas = view_package("pandas", "logits_to_df()")
    log_probs = torch.log_softmax(logits.detach().float(), dim=-1)
    order = torch.argsort(log_probs.exp(), descending=True)[:top_k]
    columns: dict[str, list[int] | list[float] | list[str]] = {"token_index": order.tolist()}
    if tokenizer is not None:
        columns["token_string"] = [tokenizer.decode([token]) for token in columns["token_index"]]
    columns["logit"] = logits.detach()[order].tolist()
    columns["log_prob"] = log_probs[order].tolist()
    columns["probability"] = log_probs.exp()[order].tolist()
    return pandas.DataFrame(columns)
