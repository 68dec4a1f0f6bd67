"""What the inputs and outputs of a hooked graph are called, whatever was done to it."""

from __future__ import annotations

import functools

# Inputs of the whole model: tokens int64 [b, p], and what may be fed beside them.
INPUT_IDS = "input_ids"
PIXELS = "pixel_values"  # of vision models in their place: float32 [b, channels, height, width]
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"
TOKEN_TYPE_IDS = "token_type_ids"  # of encoders
# What the blocks read besides, made from those by the first nodes of the graph: positions int64 [b, p], which keys each
# query may attend to bool [b, 1, q, k], and which tokens are no padding bool [b, p]. Layers with a window read local_mask in
# place of mask, which leaves out keys before the window. ALiBi reads distance float32 [q, k]: the index of the key less that
# of the query, 0 for later keys.
DECODER_INPUTS = POSITIONS, MASK, TOKEN_MASK, LOCAL_MASK, DISTANCE = (
    "positions", "mask", "token_mask", "local_mask", "distance",
)  # fmt: skip
# Encoders read the mask, the same for every query [b, 1, 1, k], and the types of tokens int64 [b, p].
ENCODER_INPUTS = MASK, TOKEN_TYPES = ("mask", "token_types")
BODY_INPUTS = (*DECODER_INPUTS, TOKEN_TYPES)
# The residual stream [b, p, d_model] that a segment of blocks starts from, and the one that it ends with.
RESIDUAL_IN = "residual"
RESIDUAL_OUT = "residual_out"
LOGITS = "logits"
# Parts that are called by themselves. A sublayer -> what its matrices read: [b, p, d_model], or [b, p, heads, d_model].
ATTENTION, MLP, WHOLE_BLOCK = "attn", "mlp", "block"
PART_INPUTS = {ATTENTION: ("query_input", "key_input", "value_input"), MLP: ("mlp_input",)}
# A KV cache: the two parts of what is kept of a layer.
KEY_AND_VALUE = ("key", "value")
PRESENT = "present."

# Gradients: the kinds of seed, and the inputs that a seed is fed through.
DENSE, SPARSE, LOSS = SEEDS = ("dense", "sparse", "loss")
SEED = "gradient_seed"
SEED_POSITIONS, SEED_TOKENS = "gradient_seed_positions", "gradient_seed_tokens"


@functools.lru_cache(4096)  # a generated token asks for all of them
def past_input(layer: int | str, part: str) -> str:
    """The input that takes the earlier keys or values of a layer.

    >>> past_input(3, "key")
    'past_key_values.3.key'
    """
    return f"past_key_values.{layer}.{part}"


@functools.lru_cache(4096)
def present_output(layer: int | str, part: str) -> str:
    """The output that gives the keys or values of a layer, earlier ones included.

    >>> present_output(3, "value")
    'present.3.value'
    """
    return f"{PRESENT}{layer}.{part}"


def gradient_output(hook: str) -> str:
    """The name of the gradient with respect to a hook point: as an output, and in a cache as in TransformerLens.

    >>> gradient_output("blocks.0.hook_resid_pre")
    'blocks.0.hook_resid_pre_grad'

    Args:
        hook: The hook point's name.

    Returns:
        The name; a hook name is never one.
    """
    return f"{hook}_grad"
