"""TransformerLens's configs and state dicts as data: what a config asks for, and which weights its model has."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from graphlens.analysis.arrays import Array, ArrayInput, as_array
from graphlens.errors import InputError
from graphlens.export.families import Spec
from graphlens.export.families.transformer_lens import TRANSFORMER_LENS, SettingsOfLens
from graphlens.file.manifest import Json, ModelConfig

_BUFFERS = ("mask", "IGNORE", "rotary_sin", "rotary_cos", "alibi")  # of attention, in TransformerLens's state dicts


def read_config(settings: Mapping[str, Json], where: str = "this config") -> tuple[Spec, ModelConfig]:
    """What a config of TransformerLens's asks for. Needs neither torch nor transformers.

    Args:
        settings: The fields of its HookedTransformerConfig, as far as they are JSON; those left out have its defaults.
        where: How an error calls it.

    Returns:
        (what the model computes, its architecture in a file's terms).

    Raises:
        ExportError: It asks for something that graphlens does not compute; the message names the field.
    """
    spec = TRANSFORMER_LENS.spec_from(SettingsOfLens(settings, where))
    name = settings.get("model_name")
    config = TRANSFORMER_LENS.model_config(
        spec, name if isinstance(name, str) and name else "custom", "float32", spec.n_ctx
    )
    return spec, dataclasses.replace(config, default_prepend_bos=settings.get("default_prepend_bos") is not False)


def state_shapes(settings: Mapping[str, Json]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the weights of a config's model, as in TransformerLens's state dict, without its buffers.

    Args:
        settings: See ``read_config``.

    Returns:
        Name -> shape. Position embeddings that ALiBi does not read, which TransformerLens has, are left out.

    Raises:
        ExportError: As ``read_config`` raises.
    """
    spec, config = read_config(settings)
    d, h, kv, w = config.d_model, config.n_heads, config.n_key_value_heads, config.d_head
    once = "_" if settings.get("n_key_value_heads") is not None else ""
    found: dict[str, tuple[int, ...]] = {"embed.W_E": (config.d_vocab, d)}

    def norm(name: str, path: str | None, size: int = d) -> None:
        norms = spec.norms if path is None else spec.other_norms.get(path, spec.norms)
        if path is not None and not norms.bare:
            found[f"{name}.w"] = (size,)
            if norms.kind == "LN":
                found[f"{name}.b"] = (size,)

    norm("embed.ln", spec.embed_norm)
    if spec.pos_embed is not None:
        found["pos_embed.W_pos"] = (spec.n_ctx, d)
    for layer in range(spec.n_layers):
        at = f"blocks.{layer}"
        norm(f"{at}.ln1", spec.ln1)
        norm(f"{at}.ln1_post", spec.ln1_post)
        norm(f"{at}.ln2", spec.ln2)
        norm(f"{at}.ln2_post", spec.ln2_post)
        found |= {f"{at}.attn.W_Q": (h, d, w), f"{at}.attn.W_O": (h, w, d)}
        found |= {f"{at}.attn.b_Q": (h, w), f"{at}.attn.b_O": (d,)}
        for letter in "KV":
            found |= {f"{at}.attn.{once}W_{letter}": (kv, d, w), f"{at}.attn.{once}b_{letter}": (kv, w)}
        for letter in "qk" if spec.attention.q_norm is not None else "":
            norm(f"{at}.attn.{letter}_norm", f"attn.{letter}_norm", w)
        if not spec.attn_only:
            m = spec.mlp.size
            found |= {f"{at}.mlp.W_in": (d, m), f"{at}.mlp.b_in": (m,), f"{at}.mlp.W_out": (m, d)}
            found |= {f"{at}.mlp.b_out": (d,)} | ({f"{at}.mlp.W_gate": (d, m)} if spec.mlp.gated else {})
            norm(f"{at}.mlp.ln", None if spec.mlp.norm is None else "mlp.ln", m)
    norm("ln_final", spec.final_norm)
    return found | {"unembed.W_U": (d, config.d_vocab_out), "unembed.b_U": (config.d_vocab_out,)}


def checked_state(
    settings: Mapping[str, Json], state: Mapping[str, ArrayInput], where: str = "the state dict", fill: bool = False
) -> dict[str, Array]:
    """A state dict of TransformerLens's, without its buffers, checked against a config.

    Args:
        settings: See ``read_config``.
        state: Name -> array or tensor, in any floating dtype.
        where: How an error calls it.
        fill: True puts zeros for biases that are missing and ones for missing weights of norms, as TransformerLens does
            for checkpoints.

    Returns:
        Name -> float32 array, for every name of ``state_shapes``.

    Raises:
        InputError: A weight is missing, is not of this model, or has another shape or no floats.
    """
    wanted, found = state_shapes(settings), dict[str, Array]()
    unused = {"pos_embed.W_pos"} - set(wanted)
    for name, value in state.items():
        leaf = name.rpartition(".")[2]
        if (".attn." in name and leaf in _BUFFERS) or name in unused:
            continue
        if name not in wanted:
            near = [
                other for other in wanted if other.endswith(f".{leaf.removeprefix('_')}") or other.endswith(f"._{leaf}")
            ]
            hint = f" It has {near[0]!r}, for one." if near else ""
            raise InputError(f"{where} holds {name!r}, and the model of this config has no such weight.{hint}")
        array = as_array(value)
        if array.shape != wanted[name]:
            raise InputError(
                f"{where}: {name!r} has shape {list(array.shape)}, and this config asks for {list(wanted[name])}."
            )
        if not np.issubdtype(array.dtype, np.floating):
            raise InputError(f"{where}: {name!r} is {array.dtype}, and weights are floats.")
        found[name] = array.astype(np.float32, copy=False)
    for name in [name for name in wanted if name not in found]:
        leaf = name.rpartition(".")[2].removeprefix("_")
        if not fill or leaf.startswith("W_"):
            raise InputError(f"{where} lacks {name!r} {list(wanted[name])}, which the model of this config has.")
        found[name] = np.full(wanted[name], 1.0 if leaf == "w" else 0.0, np.float32)
    return {name: found[name] for name in wanted}


def random_state(settings: Mapping[str, Json]) -> dict[str, Array]:
    """Random weights of a config's model, far from any symmetry, with which activations stay of order 1."""
    rng, found = np.random.default_rng(0), {}
    for name, shape in state_shapes(settings).items():
        leaf = name.rpartition(".")[2].removeprefix("_")
        wide = leaf in ("W_E", "W_pos") or not leaf.startswith("W_")
        spread = 0.5 if wide else 1 / math.sqrt(math.prod(shape[:-1]) if leaf == "W_O" else shape[-2])
        found[name] = (rng.standard_normal(shape) * spread + (leaf == "w")).astype(np.float32)
    return found
