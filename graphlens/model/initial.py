"""The parameters of a model that is built from a config: their names, shapes and order, and what they begin as."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from graphlens.analysis.arrays import Array
from graphlens.errors import InputError, RuntimeUnavailable, is_one_of

if TYPE_CHECKING:
    from graphlens.model.config import HookedTransformerConfig

INIT_MODES = ("gpt2", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "muP")


class Parameter(NamedTuple):
    """A parameter of a model.

    Attributes:
        name: In TransformerLens's state dict.
        shape: Its sizes.
        begins: What it is filled with; None where it is drawn.
    """

    name: str
    shape: tuple[int, ...]
    begins: float | None


def parameters(config: HookedTransformerConfig) -> Iterator[Parameter]:
    """The parameters of TransformerLens's model of a config, in the order in which it draws them.

    Args:
        config: The config, its sizes set.

    Raises:
        InputError: For several experts, and for norms that there are not.
    """
    if config.num_experts is not None:
        raise InputError(
            "num_experts: graphlens builds no models of several experts; from_pretrained opens such a checkpoint."
        )
    width, vocabulary = config.d_model, config.d_vocab
    yield Parameter("embed.W_E", (vocabulary, width), None)
    if config.post_embedding_ln:
        yield from _norm("embed.ln", "LN", width)
    if config.positional_embedding_type != "rotary":
        yield Parameter("pos_embed.W_pos", (config.n_ctx, width), None)
    for layer in range(config.n_layers):
        for parameter in _block(config):
            yield Parameter(f"blocks.{layer}.{parameter.name}", parameter.shape, parameter.begins)
    kind = config.normalization_type
    yield from _norm("ln_final", kind.replace("LN", "RMS") if kind and config.final_rms else kind, width)
    yield Parameter("unembed.W_U", (width, config.d_vocab_out), None)
    yield Parameter("unembed.b_U", (config.d_vocab_out,), 0)


def _norm(name: str, kind: str | None, size: int) -> Iterator[Parameter]:
    """The parameters of a norm: none, where its weights are folded or there is none."""
    if not is_one_of(kind, ("LN", "LNPre", "RMS", "RMSPre", None)):
        raise InputError(f"normalization_type={kind!r:.60}: there is 'LN', 'LNPre', 'RMS', 'RMSPre' and None.")
    if kind in ("LN", "RMS"):
        yield Parameter(f"{name}.w", (size,), 1)
    if kind == "LN":
        yield Parameter(f"{name}.b", (size,), 0)


def _block(config: HookedTransformerConfig) -> Iterator[Parameter]:
    """The parameters of a block, named within it."""
    width, heads, size, kind = config.d_model, config.n_heads, config.d_head, config.normalization_type
    for norm in ("ln1",) if config.attn_only else ("ln1", "ln2"):
        yield from _norm(norm, kind, width)
        if config.use_normalization_before_and_after and kind is not None:
            yield from _norm(f"{norm}_post", "RMS", width)
    shared = config.n_key_value_heads or heads
    under = "" if shared == heads else "_"
    yield Parameter("attn.W_Q", (heads, width, size), None)
    yield Parameter("attn.W_O", (heads, size, width), None)
    yield Parameter("attn.b_Q", (heads, size), 0)
    yield Parameter("attn.b_O", (width,), 0)
    for letter in "KV":
        yield Parameter(f"attn.{under}W_{letter}", (shared, width, size), None)
    for letter in "KV":
        yield Parameter(f"attn.{under}b_{letter}", (shared, size), 0)
    if config.use_qk_norm:
        yield from _norm("attn.q_norm", "RMS", size)
        yield from _norm("attn.k_norm", "RMS", size)
    if config.attn_only:
        return
    neurons = config.d_mlp or 4 * width
    yield Parameter("mlp.W_in", (width, neurons), None)
    yield Parameter("mlp.W_out", (neurons, width), None)
    if config.gated_mlp:
        yield Parameter("mlp.W_gate", (width, neurons), None)
    yield Parameter("mlp.b_in", (neurons,), 0)
    yield Parameter("mlp.b_out", (width,), 0)
    if config.is_layer_norm_activation():
        yield from _norm("mlp.ln", "LN" if kind == "LN" else None, neurons)


def initial_weights(config: HookedTransformerConfig) -> dict[str, Array]:
    """What the parameters of a model begin as, drawn by torch as TransformerLens draws them: the same for the same seed.

    Args:
        config: Its ``init_mode``, ``initializer_range`` and ``seed`` say how; zeros where ``init_weights`` is False.

    Raises:
        InputError: For an ``init_mode`` that there is not.
        RuntimeUnavailable: torch is not installed.
    """
    if not is_one_of(config.init_mode, INIT_MODES):
        raise InputError(f"init_mode={config.init_mode!r:.60}: there is {', '.join(INIT_MODES)}.")
    needs_export()
    from graphlens.model.torch_initial import drawn

    return drawn(config, list(parameters(config)))


def needs_export() -> None:
    """Refuses where no model can be built from a config.

    Raises:
        RuntimeUnavailable: torch is not installed.
    """
    from graphlens.pipelines.adapters import installed

    if not installed("torch"):
        raise RuntimeUnavailable(
            "a model from a config is exported before it runs, which needs torch: pip install 'graphlens-onnx[export]'. "
            "Opening an exported folder does not."
        )
