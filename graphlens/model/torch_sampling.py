"""How the next token is drawn on the torch face: by torch's generator, step by step as TransformerLens draws.

So the same seed and the same logits give TransformerLens's tokens.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from graphlens.analysis.arrays import Array
from graphlens.model.sampling import Sampler, Sampling
from graphlens.model.text import Tokens


def sampler(seed: int | None) -> Sampler:
    """What draws on the torch face.

    Args:
        seed: The draws are those that follow ``torch.manual_seed(seed)``, and torch's own state stays as it is; None leaves
            them to ``torch.manual_seed``.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)

    def choose(logits: Array, tokens: Tokens, how: Sampling) -> Tokens:
        found = draw(torch.from_numpy(np.array(logits)), tokens, how, generator)
        return cast(Tokens, found.numpy())

    return choose


def draw(logits: torch.Tensor, tokens: Tokens, how: Sampling, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draws one token for each row of logits.

    Args:
        logits: [b, V].
        tokens: int64 [b, p], those so far, for the penalties.
        how: What is asked of the choice.
        generator: Where the draws come from; None for torch's own.

    Returns:
        int64 [b].
    """
    scores = logits.detach()
    seen = torch.from_numpy(np.array(tokens)).to(scores.device)
    size = scores.shape[-1]
    if (how.repetition_penalty != 1 or how.freq_penalty) and seen.numel():
        counts = torch.zeros(len(scores), max(size, int(seen.max()) + 1), dtype=torch.long, device=scores.device)
        # Ids beyond d_vocab_out are never drawn, so they have no score to change.
        counts = counts.scatter_add(-1, seen, torch.ones_like(seen))[:, :size]
    else:
        counts = torch.zeros_like(scores, dtype=torch.long)
    if how.repetition_penalty != 1:
        changed = torch.where(scores > 0, scores / how.repetition_penalty, scores * how.repetition_penalty)
        scores = torch.where(counts > 0, changed, scores)
    if how.temperature == 0:
        return scores.argmax(-1)
    scaled = scores / how.temperature
    if not bool(torch.isfinite(scaled.amax(-1)).all()):  # a tiny temperature: all but the likeliest become -inf
        scaled = (scores.double() - scores.double().amax(-1, keepdim=True)) / how.temperature
    scores = scaled
    if how.freq_penalty:
        scores = scores - how.freq_penalty * counts
    nothing = -float("inf")
    if how.top_k is not None and how.top_k < scores.shape[-1]:
        least = scores.topk(how.top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < least, nothing)
    if how.top_p is not None and how.top_p < 1:
        ordered, order = torch.sort(scores, descending=True)
        reached = ordered.softmax(-1).cumsum(-1) > how.top_p
        beyond = torch.cat(
            [torch.zeros_like(reached[..., :1]), reached[..., :-1]], -1
        )  # the one that crosses it is kept
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), nothing)
    scores = scores.float()
    # As torch's Categorical: the same draw from the same state of the generator.
    probabilities = torch.softmax(scores - scores.logsumexp(-1, keepdim=True), -1)
    return torch.multinomial(probabilities, 1, True, generator=generator)[:, 0]
