"""The container of a run's activations: by hook name and by TransformerLens's shorthands, and what all methods need."""

from __future__ import annotations

import difflib
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import as_array, working
from graphlens.analysis.slices import Slice, SliceInput
from graphlens.errors import InputError, UnknownHookPoint
from graphlens.file.names import FLAGGED, canonical, get_act_name, split_name

Array = npt.NDArray[Any]
Key = str | tuple[str, int | None] | tuple[str, int | None, str | None]


class Activations(Mapping[str, Any]):
    """Activations by hook name, in firing order; ``ActivationCache`` adds what is computed from them.

    TransformerLens 4's names find them too, and are not among the keys.
    """

    def __init__(self, cache_dict: dict[str, Any], model: Any, has_batch_dim: bool = True) -> None:
        self.cache_dict = cache_dict
        self.model = model
        self.has_batch_dim = has_batch_dim

    # Lookup

    def _name(self, key: Key) -> str:
        name = self._full_name(key)
        return name if name in self.cache_dict else canonical(name)

    def _full_name(self, key: Key) -> str:
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
            flag = FLAGGED.get(split_name(name)[1])
            why = "If the model has it, names_filter left it out."
            if flag is not None:
                why = f"It exists only while the flag {flag!r} is set: call model.set_{flag}(True) before the run."
            raise UnknownHookPoint(f"{name!r} is not in this cache of {len(self.cache_dict)} activations.{hint} {why}")
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
        return f"{type(self).__name__} with {len(self)} activations: {shown}"

    def keys(self) -> KeysView[str]:
        """The hook names, in firing order."""
        return self.cache_dict.keys()

    def values(self) -> ValuesView[Any]:
        """The activations, in firing order."""
        return self.cache_dict.values()

    def items(self) -> ItemsView[str, Any]:
        """(hook name, activation) pairs, in firing order."""
        return self.cache_dict.items()

    @property
    def has_embed(self) -> bool:
        """Whether the token embedding is in the cache."""
        return "hook_embed" in self.cache_dict

    @property
    def has_pos_embed(self) -> bool:
        """Whether the position embedding is in the cache."""
        return "hook_pos_embed" in self.cache_dict

    # The batch axis and the device

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

    def apply_slice_to_batch_dim(self, batch_slice: SliceInput) -> Self:
        """A new cache with ``batch_slice`` of the prompts; an int drops the batch axis.

        Raises InputError for a prompt that is not in the batch, or when there is no batch axis.
        """
        taken = Slice(batch_slice)
        if not self.has_batch_dim and taken.mode != "identity":
            raise InputError("this cache has no batch axis to slice: it was removed.")
        sliced = {name: taken.apply(value) for name, value in self.cache_dict.items()} if self.has_batch_dim else {}
        return type(self)(sliced or dict(self.cache_dict), self.model, self.has_batch_dim and taken.mode != "int")

    def to(self, device: Any) -> Self:
        """This cache: activations are always on the CPU. Raises InputError for any other device."""
        if str(device) not in ("cpu", "cpu:0"):
            raise InputError(f"the activations are on the CPU and stay there: cannot move them to {str(device)!r}.")
        return self

    # Arrays in and out, for the methods

    def _plain(self, value: Any, what: str) -> Array:
        """The array of an activation or of an argument called ``what``, in its own dtype."""
        convert = getattr(self.model, "_from_user", as_array)
        try:
            return np.asarray(convert(value))
        except TypeError as error:
            raise InputError(f"{what} must be an array, not {type(value).__name__}.") from error

    def _in(self, value: Any, what: str) -> Array:
        """``_plain``, in a dtype to compute in."""
        return working(self._plain(value, what))

    def _out(self, array: Array) -> Any:
        convert = getattr(self.model, "_to_user", None)
        return array if convert is None else convert(array)

    def _labelled(self, stack: Array, labels: list[str], return_labels: bool) -> Any:
        return (self._out(stack), labels) if return_labels else self._out(stack)

    def _activation(self, name: str, layer: int | None = None, sublayer: str | None = None) -> Array:
        key = get_act_name(name, layer, sublayer)
        return self._in(self[key], key)

    def _upto(self, layer: int | None, mlp_input: bool = False) -> int:
        """A ``layer`` argument as the number of whole layers before the residual it means: None and -1 mean all."""
        count = int(self.model.cfg.n_layers)
        if layer is None or (isinstance(layer, (int, np.integer)) and layer == -1):
            layer = count
        if not isinstance(layer, (int, np.integer)) or isinstance(layer, bool) or not 0 <= layer <= count:
            raise InputError(
                f"layer {layer!r}: this model has {count} layers, so layer is 0 to {count}, "
                f"{count} (or -1, or None) being the input of the unembedding."
            )
        if mlp_input and layer == count:
            raise InputError(f"mlp_input needs a layer from 0 to {count - 1}: the unembedding has no MLP input.")
        return int(layer)
