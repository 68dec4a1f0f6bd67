"""A model from a config: weights drawn, a graph from the cache or exported once, a tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphlens.analysis.arrays import Array
from graphlens.engine.engine import Engine
from graphlens.errors import InputError, warn
from graphlens.file.tokenizer import Tokenizer, load_tokenizer
from graphlens.model.config import HookedTransformerConfig
from graphlens.model.config_of_model import Value
from graphlens.model.dtypes import dtype_name
from graphlens.model.initial import initial_weights, needs_export, parameters
from graphlens.model.of_transformers import wrapped
from graphlens.model.weights import Weights
from graphlens.runtime.providers import Providers

# What a graph is not made by: in the cache there is one for all of their values.
_NOT_OF_THE_GRAPH = (
    "seed", "init_mode", "initializer_range", "init_weights", "device", "n_devices", "dtype", "n_params",
    "tokenizer_name", "tokenizer_prepends_bos", "default_prepend_bos", "from_checkpoint", "checkpoint_index",
    "checkpoint_label_type", "checkpoint_value", "trust_remote_code", "use_attn_result", "use_split_qkv_input",
    "use_hook_mlp_in", "use_attn_in", "use_hook_tokens", "uses_rms_norm", "layer_norm_folding",
    "quantization_method", "processing", "default_padding_side", "n_ctx_trained", "model_name",
)  # fmt: skip


@dataclass(frozen=True)
class Built:
    """What a model from a config is made of.

    Attributes:
        config: The config, with what the tokenizer says filled in.
        engine: The graph, with the weights.
        base: The graph file of the same model in float32, its weights not processed.
        tokenizer: The tokenizer; None where there is none.
        weights: The weights by their TransformerLens names.
    """

    config: HookedTransformerConfig
    engine: Engine
    base: Path
    tokenizer: Tokenizer | None
    weights: Mapping[str, Array]


def build(config: HookedTransformerConfig, tokenizer: object, providers: Providers, side: str | None) -> Built:
    """Builds a model from a config.

    Args:
        config: The config; ``d_vocab`` and ``d_vocab_out`` are filled in from the tokenizer where they are not set.
        tokenizer: A transformers tokenizer or one of graphlens's; None for that of ``tokenizer_name``, if there is one.
        providers: The execution providers; see ``Engine``.
        side: The padding side that was asked for.

    Raises:
        InputError: For a config without a vocabulary, and one of a model that cannot be built.
        ExportError: For what a graph cannot be made of; for a tokenizer that cannot be had.
        RuntimeUnavailable: A package that exporting needs is not installed.
    """
    found = _tokenizer(tokenizer, config.tokenizer_name)
    if found is not None:
        if config.d_vocab == -1:
            config.d_vocab = max(found.get_vocab().values()) + 1
        if config.d_vocab_out == -1:
            config.d_vocab_out = config.d_vocab
    elif config.d_vocab == -1:
        raise InputError("d_vocab is not set: set it, or give a tokenizer, whose vocabulary it then is.")
    elif side is not None:
        warn("default_padding_side is ignored: there is no tokenizer.")
    _ensure_buildable(config)
    weights = initial_weights(config)  # before anything else may draw
    base, folder = graph_of(config)
    engine = Engine(folder, providers)
    known = Weights(engine)
    taken = {name: array for name, array in weights.items() if name in known}
    return Built(config, known.with_others(taken), base, found, taken)


def graph_of(config: HookedTransformerConfig) -> tuple[Path, Path]:
    """(the hooked folder of a config in float32, that in the config's dtype): in the cache, made if they are absent.

    Args:
        config: The config. The weights in the folders are nobody's.
    """
    from graphlens.pipelines.cache import config_export, converted_export

    needs_export()
    from graphlens.model.torch_initial import generator_kept

    with generator_kept():
        base = config_export(as_checkpoint(config), lambda: _any_weights(config))
    dtype = dtype_name(config.dtype)
    return base, base if dtype == "float32" else converted_export(base, dtype)


def as_checkpoint(config: HookedTransformerConfig) -> dict[str, Value]:
    """A config as a checkpoint's config.json has it, without what the graph is not made by.

    Args:
        config: The config.
    """
    told = {name: value for name, value in config.to_dict().items() if name in config.__dataclass_fields__}
    told = {name: value for name, value in told.items() if name not in _NOT_OF_THE_GRAPH}
    told = {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in told.items()}
    if plain["n_key_value_heads"] == plain["n_heads"]:
        plain["n_key_value_heads"] = None
    return {"model_type": "transformer_lens", **plain}


def _any_weights(config: HookedTransformerConfig) -> dict[str, Array]:
    """The weights that the graph of a config is exported with: the same for equal configs, and no norm's are trivial."""
    random, found = np.random.default_rng(0), {}
    for name, shape, begins in parameters(config):
        noise = random.standard_normal(shape, np.float32)
        if name == "pos_embed.W_pos" and config.positional_embedding_type == "alibi":
            continue  # TransformerLens has it, and does not read it
        found[name] = noise / np.float32(np.sqrt(shape[-2])) if begins is None else np.float32(begins) + 0.1 * noise
    return found


def _tokenizer(given: object, name: str | None) -> Tokenizer | None:
    """The tokenizer that is given, or has the name."""
    if given is not None:
        return wrapped(given)
    if name is None:
        return None
    from graphlens.pipelines.hub import tokenizer_folder

    found = load_tokenizer(tokenizer_folder(name))
    if found is None:
        raise InputError(f"tokenizer_name={name!r}: there is no tokenizer.json there. Pass tokenizer= instead.")
    return found


def _ensure_buildable(config: HookedTransformerConfig) -> None:
    """Refuses the config of a model that only a file can be."""
    usual = {
        "output_logits_scale": 1.0,
        "post_norm_only": False,
        "residual_norms": False,
        "rotary_short": None,
        "n_token_types": None,
    }
    for name, value in usual.items():
        if (found := getattr(config, name)) != value:
            raise InputError(
                f"{name}={found!r}: no model is built from the config of a file ({config.original_architecture}) that "
                "sets it. from_pretrained and from_onnx open the file."
            )
    if config.positional_embedding_type == "rotary" and config.original_architecture not in (None, "HookedTransformer"):
        warn(
            f"the config of a file ({config.original_architecture}) does not say whether its rotary frequencies are scaled, as "
            "Llama 3.1's are: those of this model are not."
        )
    if config.n_devices != 1:
        raise InputError(f"n_devices={config.n_devices!r}: a graphlens model runs on one device.")
    with contextlib.suppress(TypeError):
        for name in ("d_vocab", "d_vocab_out", "n_heads"):
            if getattr(config, name) < 1:
                raise InputError(f"{name}={getattr(config, name)}: it must be 1 or more.")
