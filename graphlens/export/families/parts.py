"""Parts of Specs that many families share, as their configs in transformers name them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from graphlens.errors import ExportError
from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.spec import Attention, Mlp, Norms, Rotary, Spec

# Kinds of rotary embeddings whose frequencies do not depend on the length of the input.
FIXED_ROPE = ("default", "linear", "llama3", "yarn")
LONG_ROPE = "longrope"  # one set for short inputs, one for longer ones


def rotary_of(c: ConfigReader, d_head: int, module: str = "model.rotary_emb") -> Rotary:
    """The rotary embeddings of a config.

    Args:
        c: The config.
        d_head: The width of a head.
        module: The path of the module that gives cosines and sines.

    Raises:
        ExportError: They are of a kind that is not computed.
    """
    found = c.get("rope_parameters") or {}
    if not isinstance(found, dict):
        raise ExportError(f"{c.where}: config.json sets rope_parameters={found!r:.80}, and they must be an object.")
    kinds = {key: value for key, value in found.items() if isinstance(value, dict)} or {"": found}
    types = tuple(c.get("layer_types") or ()) if "" not in kinds else ()
    for key, kind in kinds.items():
        allowed = FIXED_ROPE if key else (*FIXED_ROPE, LONG_ROPE)
        if kind.get("rope_type", "default") not in allowed:
            raise ExportError(
                f"{c.where}: config.json sets rope_type={kind['rope_type']!r}{f' for {key}' if key else ''}; graphlens exports "
                f"only {', '.join(allowed)}."
            )
    main = kinds.get("full_attention", next(iter(kinds.values())))
    part, short = main.get("partial_rotary_factor", 1.0), None
    numbers = isinstance(part, int | float) and not isinstance(part, bool)
    if not numbers or (d_head > 1 and not 2 <= d_head * part <= d_head):
        raise ExportError(
            f"{c.where}: config.json sets partial_rotary_factor={part!r:.80} for heads of width {d_head}: from 2 dimensions to "
            "all of them can be rotated."
        )
    if main.get("rope_type") == LONG_ROPE:
        short = main.get("original_max_position_embeddings")
        if type(short) is not int or short < 1:
            raise ExportError(
                f"{c.where}: config.json sets original_max_position_embeddings={short!r:.80} for longrope, and it must be a "
                "whole number above 0."
            )
    return Rotary(module, int(d_head * part), base=main.get("rope_theta"), types=types, short=short)


def attention_of(c: ConfigReader, rotary: bool = True, **more: Any) -> Attention:
    """Attention with matrices and, if wanted, rotary embeddings as in Llama.

    Args:
        c: The config.
        rotary: False for no rotary embeddings.
        more: Fields of Attention that are otherwise.
    """
    n_heads = c.size("num_attention_heads")
    d_head = c.size("hidden_size") // n_heads if c.get("head_dim") is None else c.size("head_dim")
    made = Attention(
        n_heads=n_heads,
        n_key_value_heads=c.size("num_key_value_heads", n_heads),
        d_head=d_head,
        scale=d_head**-0.5 if d_head > 0 else 1.0,
        rotary=rotary_of(c, d_head) if rotary else None,
    )
    return replace(made, **more)


def refuse_own_width(c: ConfigReader) -> None:
    """Refuses a config with a width of heads, for an architecture in which hidden_size alone decides it.

    Args:
        c: The config.

    Raises:
        ExportError: It has one, and another than hidden_size gives.
    """
    c.only("head_dim", None, c.size("hidden_size") // c.size("num_attention_heads"))


def windowed(c: ConfigReader, attention: Attention, n_layers: int) -> Attention:
    """Attention with the window of a config: in the layers that it names, or in all where it names none.

    Args:
        c: The config.
        attention: Attention without a window.
        n_layers: The number of blocks.
    """
    window, types = c.get("sliding_window"), c.get("layer_types")
    if window is None or window is False:
        if "sliding_attention" in (types or ()):
            raise ExportError(
                f"{c.where}: config.json gives layers the type 'sliding_attention' and no sliding_window (or "
                "use_sliding_window=false): how far they see is not known."
            )
        return attention
    kinds = types or ["sliding_attention"] * n_layers
    if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
        raise ExportError(
            f"{c.where}: config.json gives a layer the type {sorted(unknown)[0]!r}, which is not computed."
        )
    local = frozenset(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")
    return replace(attention, window=c.size("sliding_window"), local=local) if local else attention


def llama_like(c: ConfigReader, *, windows: bool = False, **more: Any) -> Spec:
    """The decoder of Llama, which many others change in a place or two.

    Args:
        c: The config.
        windows: True for an architecture that heeds the config's window.
        more: Fields of Spec that are otherwise.
    """
    n_layers = c.size("num_hidden_layers")
    c.get("attention_bias"), c.get("mlp_bias")  # a model with biases has parameters of their names
    fields: dict[str, Any] = {
        "n_layers": n_layers,
        "d_model": c.size("hidden_size"),
        "d_vocab": c.size("vocab_size"),
        "n_ctx": c.size("max_position_embeddings"),
    }
    if "norms" not in more:
        fields["norms"] = Norms("RMS", c.number("rms_norm_eps"))
    if "attention" not in more:
        fields["attention"] = attention_of(c)
    if "mlp" not in more:
        fields["mlp"] = Mlp(c.size("intermediate_size"), c.get("hidden_act", "silu"), gate="gate_proj")
    fields |= more
    if windows:
        fields["attention"] = windowed(c, fields["attention"], n_layers)
    return Spec(**fields)


def gemma_like(c: ConfigReader, attention: Attention) -> Spec:
    """The decoder of Gemma 2 and 3: norms before and after each sublayer, windows, a gated MLP, scaled embeddings.

    Args:
        c: The config.
        attention: Their attention, without a window.
    """
    c.only("use_bidirectional_attention", False)
    return llama_like(
        c,
        windows=True,
        norms=Norms("RMS", c.number("rms_norm_eps"), plus_one=True),
        attention=attention,
        mlp=Mlp(c.size("intermediate_size"), c.get("hidden_activation", "gelu_pytorch_tanh"), gate="gate_proj"),
        embed_scale=c.size("hidden_size") ** 0.5,
        ln1_post="post_attention_layernorm",
        ln2="pre_feedforward_layernorm",
        ln2_post="post_feedforward_layernorm",
        logit_softcap=c.get("final_logit_softcapping"),
    )
