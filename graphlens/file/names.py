"""The vocabulary of hook points: TransformerLens's names, their axes, their firing order, and how to look them up.

Names and shapes follow ``HookedTransformer`` of TransformerLens 3.9.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import NoneType
from typing import TYPE_CHECKING

from graphlens.errors import InputTypeError, UnknownHookPoint
from graphlens.file.bridge import has_normed_embeddings, inside, is_bridges, outside
from graphlens.file.sae_names import FEATURES, host_of, is_of_sae, with_saes

if TYPE_CHECKING:
    from graphlens.file.manifest import ModelConfig

# Which hook points: one, several, those that a function says True to, or all.
NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
Axes = tuple[str, ...]

RESIDUAL = ("batch", "pos", "d_model")
HEADS = ("batch", "pos", "head_index", "d_head")
KEY_VALUE_HEADS = ("batch", "pos", "key_value_head_index", "d_head")
ATTENTION = ("batch", "head_index", "query_pos", "key_pos")
SCALE = ("batch", "pos", "1")
NEURONS = ("batch", "pos", "d_mlp")
HEAD_RESIDUAL = ("batch", "pos", "head_index", "d_model")
KEY_VALUE_RESIDUAL = ("batch", "pos", "key_value_head_index", "d_model")
# The norm of each head's query or key: TransformerLens puts batch, positions and heads into one axis.
QUERIES, KEYS = "batch_pos_head", "batch_pos_key_value_head"
TOKENS = "batch_pos"  # batch and positions in one axis, where an MLP chooses experts
# Each such axis -> what it has besides batch and positions.
JOINT_AXES: Mapping[str, tuple[str, ...]] = {QUERIES: ("head_index",), KEYS: ("key_value_head_index",), TOKENS: ()}
# The norm of all heads' queries or keys together (OLMo-2).
_OF_ALL_HEADS: Mapping[str, Axes] = {
    "attn.q_norm.hook_scale": ("batch", "pos", "1"),
    "attn.q_norm.hook_normalized": ("batch", "pos", "d_queries"),
    "attn.k_norm.hook_scale": ("batch", "pos", "1"),
    "attn.k_norm.hook_normalized": ("batch", "pos", "d_keys"),
}

# Hook point -> axes, in firing order, flagged hook points included. Names with "@" are not hook points but earlier
# firings of the name before the "@": with split inputs ln1 runs on queries, keys and values apart, and the cache keeps
# the last.
BEFORE_BLOCKS: Mapping[str, Axes] = {
    "hook_tokens": ("batch", "pos"),
    "embed.hook_embed": RESIDUAL,
    "embed.hook_pos_embed": RESIDUAL,
    "embed.hook_token_type_embed": RESIDUAL,
    "embed.ln.hook_scale": SCALE,
    "embed.ln.hook_normalized": RESIDUAL,
    "hook_full_embed": RESIDUAL,
    "hook_embed": RESIDUAL,
    "hook_pos_embed": RESIDUAL,
}
BLOCK: Mapping[str, Axes] = {
    "hook_resid_pre": RESIDUAL,
    "hook_attn_in": HEAD_RESIDUAL,
    "hook_q_input": HEAD_RESIDUAL,
    "hook_k_input": KEY_VALUE_RESIDUAL,
    "hook_v_input": KEY_VALUE_RESIDUAL,
    "ln1.hook_scale@q": SCALE,
    "ln1.hook_normalized@q": RESIDUAL,
    "ln1.hook_scale@k": SCALE,
    "ln1.hook_normalized@k": RESIDUAL,
    "ln1.hook_scale": SCALE,
    "ln1.hook_normalized": RESIDUAL,
    "attn.hook_q": HEADS,
    "attn.hook_k": KEY_VALUE_HEADS,
    "attn.hook_v": KEY_VALUE_HEADS,
    "attn.q_norm.hook_scale": (QUERIES, "1"),
    "attn.q_norm.hook_normalized": (QUERIES, "d_head"),
    "attn.k_norm.hook_scale": (KEYS, "1"),
    "attn.k_norm.hook_normalized": (KEYS, "d_head"),
    "attn.hook_rot_q": HEADS,
    "attn.hook_rot_k": KEY_VALUE_HEADS,
    "attn.hook_attn_scores": ATTENTION,
    "attn.hook_pattern": ATTENTION,
    "attn.hook_z": HEADS,
    "attn.hook_result": HEAD_RESIDUAL,
    "ln1_post.hook_scale": SCALE,
    "ln1_post.hook_normalized": RESIDUAL,
    "hook_attn_out": RESIDUAL,
    "hook_resid_mid": RESIDUAL,
    "hook_mlp_in": RESIDUAL,
    "ln2.hook_scale": SCALE,
    "ln2.hook_normalized": RESIDUAL,
    "mlp.hook_expert_weights": (TOKENS, "expert"),
    "mlp.hook_expert_indices": (TOKENS, "chosen_expert"),
    "mlp.hook_pre": NEURONS,
    "mlp.hook_pre_linear": NEURONS,
    "mlp.hook_mid": NEURONS,
    "mlp.ln.hook_scale": SCALE,
    "mlp.ln.hook_normalized": NEURONS,
    "mlp.hook_post": NEURONS,
    "ln2_post.hook_scale": SCALE,
    "ln2_post.hook_normalized": RESIDUAL,
    "hook_mlp_out": RESIDUAL,
    "hook_resid_post": RESIDUAL,
    "hook_normalized_resid_post": RESIDUAL,
}
AFTER_BLOCKS: Mapping[str, Axes] = {
    "mlm_head.ln.hook_scale": SCALE,
    "mlm_head.ln.hook_normalized": RESIDUAL,
    "ln_final.hook_scale": SCALE,
    "ln_final.hook_normalized": RESIDUAL,
    "unembed.hook_in": RESIDUAL,
    "unembed.hook_out": ("batch", "pos", "d_vocab"),
    "head.hook_in": ("batch", "d_model"),  # of a classifier of images, which reads one token
    "head.hook_out": ("batch", "d_vocab"),
}
# The name of every axis that an activation can have.
AXES = frozenset(
    axis for table in (BEFORE_BLOCKS, BLOCK, AFTER_BLOCKS, _OF_ALL_HEADS) for axes in table.values() for axis in axes
) | {FEATURES}
EMBEDDINGS = ("hook_embed", "hook_pos_embed")  # what the residual stream begins as the sum of, where a model has them
# Weights by their names in a decoder and in an encoder.
TOKEN_EMBEDDINGS = ("embed.W_E", "embed.embed.W_E", "embed.W_tokens")
POSITION_EMBEDDINGS = ("pos_embed.W_pos", "embed.pos_embed.W_pos")
TYPE_EMBEDDINGS = ("embed.token_type_embed.W_token_type",)
SCORES = "attn.hook_attn_scores"
# What programs that mask with a number in place of -inf add to scores at least: -10,000, -3.4e38 (float32), -65504 (float16).
MASKED_BELOW = -9000.0
CHOSEN_EXPERTS = "mlp.hook_expert_indices"
UNEMBEDDED = "unembed.hook_in"  # what the unembedding reads
# Hook points that exist only while a flag is set: they are not in a plain hooked file.
FLAGGED: Mapping[str, str] = {
    "hook_tokens": "use_hook_tokens",
    "hook_attn_in": "use_attn_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "attn.hook_result": "use_attn_result",
    "hook_mlp_in": "use_hook_mlp_in",
}
_BLOCK_NAME = re.compile(r"blocks\.(\d+)\.(.+)")


def split_name(name: str) -> tuple[int | None, str]:
    """The layer of a name, or None outside the blocks, and what follows ``blocks.N.``.

    >>> split_name("blocks.3.attn.hook_z")
    (3, 'attn.hook_z')
    >>> split_name("hook_embed")
    (None, 'hook_embed')
    """
    match = _BLOCK_NAME.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name)


def block_name(layer: int) -> str:
    """The name of a block: "blocks.3"."""
    return f"blocks.{layer}"


def in_block(layer: int, name: str) -> str:
    """The full name of a block's hook point, weight or part.

    >>> in_block(3, "attn.hook_z")
    'blocks.3.attn.hook_z'
    """
    return f"{block_name(layer)}.{name}"


def canonical(name: str, names: Collection[str] = ()) -> str:
    """Our name of the hook point that TransformerLens 4 calls ``name``; any other name is handed back as it is.

    >>> canonical("blocks.2.attn.q.hook_out")
    'blocks.2.attn.hook_q'

    Args:
        name: The name.
        names: The model's hook points in firing order: what some names mean depends on the architecture.
    """
    layer, rest = split_name(name)
    if is_of_sae(name):
        return f"{canonical(host_of(name), names)}{name.removeprefix(host_of(name))}"
    if not is_bridges(rest, layer is not None):
        return name
    if layer is None:
        return outside(names).get(name, name)
    block = in_block(layer, "")
    own = [other.removeprefix(block) for other in names if other.startswith(block)]
    table = inside(own, has_normed_embeddings(names))
    return in_block(layer, table[rest]) if rest in table else name


def all_names(n_layers: int) -> list[str]:
    """Every name that a hook point of a model with so many blocks may have, in firing order, flagged ones included."""
    blocks = [in_block(layer, name) for layer in range(n_layers) for name in BLOCK]
    return [*BEFORE_BLOCKS, *blocks, *AFTER_BLOCKS]


def firing_order(names: Iterable[str], n_layers: int) -> list[str]:
    """Sorts hook names into the firing order of most architectures; file/firing.py has that of a graph.

    Args:
        names: Hook names of one model; others are left out.
        n_layers: The number of blocks of the model.
    """
    wanted = set(names)
    return with_saes(all_names(n_layers), wanted)


def axes_of(name: str, count: int | None = None) -> Axes:
    """The axes of a hook point's activation.

    >>> axes_of("blocks.3.attn.hook_z")
    ('batch', 'pos', 'head_index', 'd_head')

    Args:
        name: The hook point.
        count: How many axes it has, where that depends on the architecture: norms of queries and keys.
    """
    layer, rest = split_name(name)
    if count is not None and rest in _OF_ALL_HEADS and len(_OF_ALL_HEADS[rest]) == count:
        return _OF_ALL_HEADS[rest]
    table = {**BEFORE_BLOCKS, **AFTER_BLOCKS} if layer is None else BLOCK
    return table[rest]


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Axis -> size, for the axes whose size does not depend on the input."""
    return {
        "1": 1,
        "d_model": config.d_model,
        "d_head": config.d_head,
        "d_mlp": config.d_mlp,
        "d_vocab": config.d_vocab_out,  # of logits
        "vocabulary": config.d_vocab,  # of tokens; no axis
        "head_index": config.n_heads,
        "key_value_head_index": config.n_key_value_heads,
        "d_queries": config.n_heads * config.d_head,
        "d_keys": config.n_key_value_heads * config.d_head,
        "expert": config.num_experts or 1,
        "chosen_expert": config.experts_per_token or 1,
    }


# Hook points that only some architectures have: what a model without them is like, and what it has instead.
_INSTEAD: Mapping[str, str] = {
    "hook_resid_mid": "attention and MLP of its blocks both read hook_resid_pre, and hook_resid_post has the sum of all three",
    **dict.fromkeys(("ln_final.hook_scale", "ln_final.hook_normalized"), "no norm comes before unembed.hook_in"),
    "hook_pos_embed": "it adds no position embeddings; the residual stream begins as hook_embed",
    "attn.hook_rot_q": "it does not rotate queries by their positions; there is attn.hook_q",
    "attn.hook_rot_k": "it does not rotate keys by their positions; there is attn.hook_k",
    "mlp.hook_pre_linear": "its MLPs have no gate; there are mlp.hook_pre and mlp.hook_post",
}
_EXPERTS = "its MLPs are several experts; there are mlp.hook_expert_weights, mlp.hook_expert_indices and hook_mlp_out"


def unknown_hook(name: str, names: Sequence[str], n_layers: int) -> UnknownHookPoint:
    """The error for a name that is no hook point of a model: why it is none, and the nearest names that are.

    Args:
        name: The name that was asked for.
        names: The names of the model's hook points.
        n_layers: The number of its blocks.
    """
    layer, rest = split_name(name)
    if is_of_sae(name) and host_of(name) in names:
        error = " with its error term (use_error_term=True)" if name.endswith("_error") else ""
        return UnknownHookPoint(
            f"{name!r} exists only while an SAE stands there{error}: model.add_sae(sae) puts one there."
        )
    if rest in FLAGGED and (layer is None) == (rest == "hook_tokens") and (layer or 0) < n_layers:
        return UnknownHookPoint(
            f"{name!r} exists only while the flag {FLAGGED[rest]!r} is set: call model.set_{FLAGGED[rest]}(True) first."
        )
    # In the hook map of whole blocks what is not there is not in the architecture.
    whole = {"hook_embed"} if layer is None else {in_block(layer, end) for end in ("hook_resid_pre", "hook_mlp_out")}
    experts = layer is not None and in_block(layer, CHOSEN_EXPERTS) in names
    instead = _EXPERTS if experts and rest in BLOCK and rest.startswith("mlp.") else _INSTEAD.get(rest)
    if instead and whole <= set(names):
        return UnknownHookPoint(f"{name!r} is not a hook point of this model: {instead}.")
    why = "is not a hook point of this model."
    if layer is not None and layer >= n_layers and rest in BLOCK:
        why = f"this model has {n_layers} layers (0-{n_layers - 1})."
    # A wrong layer, a wrong sublayer or a typo: compare whole names, then the part after the block.
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if layer is not None and layer >= n_layers:
        near = [other for other in [in_block(n_layers - 1, rest)] if other in names] or near
    if not near:
        tail = name.rsplit(".", 1)[-1]
        near = [other for other in names if tail and tail in other][:3] or difflib.get_close_matches(
            name, names, n=3, cutoff=0.2
        )
    hint = f" Nearest: {', '.join(map(repr, near))}." if near else ""
    return UnknownHookPoint(f"{name!r}: {why}{hint} List them with model.hook_points().")


def select(names: Sequence[str], names_filter: NamesFilter, n_layers: int) -> list[str]:
    """The names that a filter picks, in the order of ``names``.

    Args:
        names: The names of a model's hook points.
        names_filter: None picks all. A string or list picks exactly those names, TransformerLens 4's among them. A
            function is called with each of our names, and picks those that it returns True for.
        n_layers: The number of blocks of the model.

    Raises:
        UnknownHookPoint: A name does not exist, or the filter picks nothing. (TransformerLens gives an empty cache then,
            which reads as success.)
        TypeError: The list holds something else than strings.
    """
    if names_filter is None:
        return list(names)
    if callable(names_filter):
        picked = [name for name in names if names_filter(name)]
        if not picked:
            raise UnknownHookPoint(
                f"names_filter matches none of the {len(names)} hook points of this model. "
                f"They look like {names[0]!r} and {names[min(len(names) - 1, 10)]!r}; "
                "list them with model.hook_points()."
            )
        return picked
    if isinstance(names_filter, str) and names_filter in names:
        return [str(names_filter)]
    if not isinstance(names_filter, Iterable):
        raise InputTypeError(
            f"names_filter must be a hook name, a list of names or a function, not {type(names_filter).__name__}"
        )
    wanted = [names_filter] if isinstance(names_filter, str) else list(names_filter)
    if not wanted:
        raise UnknownHookPoint("names_filter is an empty list: it would cache nothing. Pass None to cache everything.")
    known = set(names)
    for name in wanted:
        if not isinstance(name, str):
            raise InputTypeError(f"names_filter must hold strings, not {type(name).__name__}")
    wanted = [name if name in known else canonical(name, names) for name in wanted]
    for name in wanted:
        if name not in known:
            raise unknown_hook(name, names, n_layers)
    picked_names = set(wanted)
    return [name for name in names if name in picked_names]


_ATTN = ("k", "v", "q", "z", "rot_k", "rot_q", "result", "pattern", "attn_scores")
_MLP = ("pre", "post", "mid", "pre_linear")
_NAME_ALIASES = {"attn": "pattern", "attn_logits": "attn_scores", "key": "k", "query": "q", "value": "v", "mlp_pre": "pre",
                 "mlp_mid": "mid", "mlp_post": "post"}  # fmt: skip
_LAYER_TYPES = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}


def get_act_name(name: str, layer: int | None = None, layer_type: str | None = None) -> str:
    """The full name of a hook point from a shorter one, by the rules of TransformerLens's ``utils.get_act_name``.

    >>> get_act_name("resid_pre", 3)
    'blocks.3.hook_resid_pre'
    >>> get_act_name("k6")
    'blocks.6.attn.hook_k'
    >>> get_act_name("scale4ln1")
    'blocks.4.ln1.hook_scale'

    Args:
        name: A full name, which is handed back, or the end of one, which may carry its layer and sublayer.
        layer: The layer; ``scale`` and ``normalized`` without one are those of the final norm.
        layer_type: The sublayer, e.g. ``"attn"``, ``"mlp"`` or ``"ln1"``.

    Returns:
        The full name. Nothing says that a model has such a hook point.

    Raises:
        UnknownHookPoint: For what is no text.
    """
    if not isinstance(name, str) or not isinstance(layer_type, (str, NoneType)):
        raise UnknownHookPoint(
            f"({name!r:.60}, {layer!r:.60}, {layer_type!r:.60}) names no hook point: ('z', 3) would."
        )
    if ("." in name or name.startswith("hook_")) and layer is None and layer_type is None:
        return name
    match = re.fullmatch(r"([a-z_]+)(\d+)([a-z]?.*)", name)
    if match is not None:
        name, layer, layer_type = match[1], int(match[2]), match[3] or layer_type
    name = _NAME_ALIASES.get(name, name)
    layer_type = _LAYER_TYPES.get(layer_type or "", layer_type)
    if name in _ATTN:
        layer_type = "attn"
    elif name in _MLP:
        layer_type = "mlp"
    elif name in ("scale", "normalized") and layer is None:
        layer_type = "ln_final"
    full = (f"{layer_type}." if layer_type else "") + f"hook_{name}"
    return full if layer is None else in_block(layer, full)
