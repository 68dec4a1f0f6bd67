"""The activations of one run, by hook name and by TransformerLens's shorthands."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, Self

from graphlens.errors import InputError, UnknownHookPoint
from graphlens.hook_points import get_act_name

Key = str | tuple[str, int | None] | tuple[str, int | None, str | None]


class ActivationCache(Mapping[str, Any]):
    """Activations by hook name, in firing order (TransformerLens's ActivationCache).

    Keys: a full name, ``"k6"``, ``"scale4ln1"``, ``("resid_pre", 3)``, ``("pattern", -1, "attn")`` or
    ``("embed", None)``.
    Values are arrays (tensors on the torch face) shaped as ``model.hook_points()`` lists them.
    """

    def __init__(self, cache_dict: dict[str, Any], model: Any, has_batch_dim: bool = True) -> None:
        self.cache_dict = cache_dict
        self.model = model
        self.has_batch_dim = has_batch_dim

    def _name(self, key: Key) -> str:
        if isinstance(key, str):
            return key if key in self.cache_dict else get_act_name(key)
        name, layer, *rest = key
        if layer is not None and layer < 0:
            layer += self.model.cfg.n_layers
        return get_act_name(name, layer, rest[0] if rest else None)

    def __getitem__(self, key: Key) -> Any:
        name = self._name(key)
        if name not in self.cache_dict:
            near = difflib.get_close_matches(name, self.cache_dict, n=3, cutoff=0.4)
            hint = f" Nearest: {', '.join(map(repr, near))}." if near else ""
            raise UnknownHookPoint(
                f"{name!r} is not in this cache of {len(self.cache_dict)} activations.{hint} "
                "If the model has it, names_filter left it out."
            )
        return self.cache_dict[name]

    def __contains__(self, key: object) -> bool:
        try:
            return self._name(key) in self.cache_dict  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __repr__(self) -> str:
        shown = ", ".join([*list(self)[:4], *(["..."] if len(self) > 4 else [])])
        return f"ActivationCache with {len(self)} activations: {shown}"

    def remove_batch_dim(self) -> Self:
        """Drops the batch axis of every activation, in place. Raises InputError for a batch of more than one."""
        if self.has_batch_dim:
            for name, value in self.cache_dict.items():
                if value.shape[0] != 1:
                    raise InputError(
                        f"cannot drop the batch axis of {name!r}: the batch holds {value.shape[0]} prompts."
                    )
            self.cache_dict = {name: value[0] for name, value in self.cache_dict.items()}
            self.has_batch_dim = False
        return self
