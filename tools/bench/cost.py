"""What a token of a harvest costs, from a model's sizes alone: operations, bytes that pass through memory, bytes on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

FLOAT, BESIDE = 4, 16  # bytes of a number that is computed with; of a token's id, document and position


class Sizes(Protocol):
    """What of a model's config decides the cost."""

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int


@dataclass(frozen=True)
class Cost:
    """What one token costs.

    ``products``: operations of matrix products, an addition and a multiplication being two. ``functions``: exponentials,
    error functions and the like. ``read``: bytes that operators read and write in memory, weights included. ``written``: bytes
    that go to the disk.
    """

    products: float
    functions: float
    read: float
    written: float

    def seconds(self, rates: Mapping[str, float]) -> float:
        """How long it takes at so many a second of each: "products", "functions", "read" and "written"."""
        return sum(getattr(self, name) / rates[name] for name in ("products", "functions", "read", "written"))


def of_a_token(
    sizes: Sizes, blocks: int, context: int, run_tokens: int, harvested: int, key_heads: int = 0, gated: bool = False
) -> Cost:
    """The cost of one token of a row of ``context`` tokens, ``run_tokens`` being run at once.

    ``blocks``: how many blocks are run. ``harvested``: bytes of activations that are written of it. ``key_heads``: 0 for as many
    as heads. ``gated``: whether the MLP has a gate.
    """
    d, mlp, heads = sizes.d_model, sizes.d_mlp, sizes.n_heads
    queries, keys = heads * sizes.d_head, (key_heads or heads) * sizes.d_head
    weights = d * (2 * queries + 2 * keys) + (3 if gated else 2) * d * mlp
    scores = heads * context
    # Of a block, in numbers: both norms and both sums into the residual stream; queries, keys and values, split into heads,
    # moved and biased; scores masked, normalised and multiplied; the MLP's two products, biases and function.
    passed = 18 * d + 6 * (queries + 2 * keys) + 6 * queries + 6 * scores + (8 if gated else 6) * mlp
    return Cost(
        products=blocks * (2 * weights + 4 * context * queries),
        functions=blocks * (mlp + scores),
        read=blocks * (passed + weights / run_tokens) * FLOAT,
        written=harvested + BESIDE,
    )
