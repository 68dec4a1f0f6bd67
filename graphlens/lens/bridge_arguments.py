"""The arguments that TransformerLens 4's TransformerBridge has beside those of HookedTransformer."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import cast

import torch

from graphlens.errors import InputError
from graphlens.model.hook_calls import HookFunction
from graphlens.model.hooks import HookPoint
from graphlens.model.kv_cache import KeyValueCache

# TransformerLens 4's other arguments of boot_transformers, with the values at which they ask for nothing.
_ASKS_NOTHING: dict[str, object] = {
    "hf_config_overrides": {},
    "load_weights": True,
    "trust_remote_code": False,
    "model_class": None,
    "code_revision": None,
    "checkpoint_index": None,
    "checkpoint_value": None,
    "device_map": None,
    "n_devices": 1,
    "max_memory": None,
    "offload_folder": None,
}


def check_boot(asked: Mapping[str, object]) -> None:
    """Refuses what ``boot_transformers`` cannot honour.

    Args:
        asked: TransformerLens 4's arguments by name.

    Raises:
        InputError: For one that asks for something, and for one that there is not.
    """
    for name, value in asked.items():
        if name not in _ASKS_NOTHING or not (value is None or repr(value) == repr(_ASKS_NOTHING[name])):
            raise InputError(f"boot_transformers cannot honour {name}={value!r}.")


def one_cache(*given: object) -> KeyValueCache | None:
    """The KV cache that was given under one of two names.

    Args:
        *given: What was given under each of them.

    Raises:
        InputError: For two, and for what is no KV cache of graphlens.
    """
    caches = [cache for cache in given if cache is not None]
    if len(caches) > 1:
        raise InputError("past_key_values and past_kv_cache are the same argument: pass one of them.")
    if not caches:
        return None
    if not isinstance(caches[0], KeyValueCache):
        raise InputError(
            f"past_key_values must be graphlens's KeyValueCache, not {type(caches[0]).__name__}: "
            "KeyValueCache.init_cache(model.cfg, 'cpu', batch_size)."
        )
    return caches[0]


def without_batch(function: HookFunction) -> HookFunction:
    """A hook that is called without the axis of a batch of one.

    Args:
        function: The hook.
    """

    @functools.wraps(function)
    def run(activation: torch.Tensor, hook: HookPoint) -> torch.Tensor | Sequence[torch.Tensor] | None:
        if activation.shape[0] != 1:
            return cast("torch.Tensor | None", function(activation, hook=hook))
        result = function(activation[0], hook=hook)
        return result.unsqueeze(0) if isinstance(result, torch.Tensor) else result

    return run
