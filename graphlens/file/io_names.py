"""What the inputs and outputs of a differentiated graph are called."""

from __future__ import annotations

DENSE, SPARSE, LOSS = SEEDS = ("dense", "sparse", "loss")
SEED = "gradient_seed"
SEED_POSITIONS, SEED_TOKENS = "gradient_seed_positions", "gradient_seed_tokens"


def gradient_output(hook: str) -> str:
    """The name of the gradient with respect to a hook point: as an output, and in a cache as in TransformerLens.

    >>> gradient_output("blocks.0.hook_resid_pre")
    'blocks.0.hook_resid_pre_grad'
    """
    return f"{hook}_grad"
