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


@dataclass(frozen=True)
class Published:
    """The sizes of a model that is not at hand."""

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    key_heads: int = 0
    gated: bool = False


GPT2_SMALL = Published(12, 768, 12, 64, 3072)
LLAMA_8B = Published(32, 4096, 32, 128, 14336, key_heads=8, gated=True)
# What a core of the machine of docs/benchmarks-scale.md does in a second, rounded; and what an H100 is taken to do of products.
CORE = {"products": 100e9, "functions": 2e9, "read": 25e9, "written": 0.55e9}
H100 = {"float32": 67e12 / 2, "float16": 989e12 * 2 / 5}
TOKENS = 1e9
# What is harvested -> sizes, blocks, tokens of a row, hook points.
ON_PAPER = {
    "GPT-2 small, resid_pre of layer 6": (GPT2_SMALL, 6, 128, 1),
    "GPT-2 small, all resid_post": (GPT2_SMALL, 12, 128, 12),
    "Llama-3 8B, resid_post of layer 15": (LLAMA_8B, 16, 1024, 1),
    "Llama-3 8B, all resid_post": (LLAMA_8B, 32, 1024, 32),
}


def main() -> None:
    """Prints what a billion tokens cost on paper, written in float16: docs/scale.md has it."""
    for label, (sizes, blocks, context, hooks) in ON_PAPER.items():
        each = of_a_token(sizes, blocks, context, 2048, hooks * sizes.d_model * 2, sizes.key_heads, sizes.gated)
        seconds = each.seconds(CORE)
        gpu = ", ".join(f"{TOKENS * each.products / rate / 3600:.1f} h in {name}" for name, rate in H100.items())
        print(
            f"{label}, rows of {context}: {1 / seconds:,.1f} tokens/s a core, {TOKENS * seconds / 3600:,.0f} core hours; an H100 "
            f"{gpu}; {TOKENS * each.written / 1e12:,.1f} TB"
        )


if __name__ == "__main__":
    main()
