"""The container of a run's activations: by hook name and by TransformerLens's shorthands."""

from __future__ import annotations

import copy
import difflib
from collections import Counter
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT, UserArray
from graphlens.analysis.cache.reader import CacheModel
from graphlens.analysis.slices import Slice, SliceInput
from graphlens.errors import InputError, UnknownHookPoint, checked_number
from graphlens.file.names import BLOCK, FLAGGED, JOINT_AXES, canonical, get_act_name, split_name

if TYPE_CHECKING:
    from graphlens.views.pages import View

Key = str | tuple[str] | tuple[str, int | None] | tuple[str, int | None, str | None]


class Activations(Mapping[str, ArrayT]):
    """Activations by hook name, in firing order; ``ActivationCache`` adds what is computed from them.

    TransformerLens 4's names find them too, and are not among the keys.

    Args:
        cache_dict: The activations by hook name.
        model: The model that ran.
        has_batch_dim: Whether the activations have a batch axis.

    Attributes:
        mask: int64 [b, p], 0 at padding of the run; None where none is known of.
        straight_through: Operators that round -> how many of them its gradients passed as if they did not (of a quantised
            model they are those of the products with the dequantised weights); empty where all are derivatives themselves.
    """

    mask: Array | None = None
    straight_through: Mapping[str, int] = MappingProxyType({})

    def __init__(self, cache_dict: dict[str, ArrayT], model: CacheModel[ArrayT], has_batch_dim: bool = True) -> None:
        self.cache_dict = cache_dict
        self.model = model
        self.has_batch_dim = has_batch_dim

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """A cache with activations of its own, and the same model."""
        other = copy.copy(self)
        other.cache_dict = copy.deepcopy(self.cache_dict, memo)
        return other

    # Lookup

    def _name(self, key: Key) -> str:
        """The hook name that a key means, whether it is in the cache or not."""
        name = self._full_name(key)
        return name if name in self.cache_dict else canonical(name, self.model.hook_dict)

    def _full_name(self, key: Key) -> str:
        """The key with shorthands written out."""
        if isinstance(key, str):
            return key if key in self.cache_dict else get_act_name(key)
        if not isinstance(key, tuple) or not 1 <= len(key) <= 3:
            raise UnknownHookPoint(f"{key!r:.80} names no activation: pass a hook name, or a tuple like ('z', 3).")
        name, given, *rest = (*key, None) if len(key) == 1 else key
        layer = None if given is None else checked_number(given, "layer")
        if layer is not None and layer < 0:
            layer += self.model.cfg.n_layers
        return get_act_name(name, layer, rest[0] if rest else None)

    def __getitem__(self, key: Key) -> ArrayT:
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
        except (TypeError, ValueError, KeyError):
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

    def values(self) -> ValuesView[ArrayT]:
        """The activations, in firing order."""
        return self.cache_dict.values()

    def items(self) -> ItemsView[str, ArrayT]:
        """(hook name, activation) pairs, in firing order."""
        return self.cache_dict.items()

    def view(self) -> View:
        """What a notebook shows: each activation's shape, dtype and statistics. Patterns: ``views.attention(cache, tokens)``."""
        from graphlens.views.listing import activations

        return activations(self, title=type(self).__name__)

    def _repr_html_(self) -> str:
        from graphlens.views.pages import in_notebook

        return in_notebook(self)

    @property
    def has_embed(self) -> bool:
        """True if the token embedding is in the cache."""
        return "hook_embed" in self

    @property
    def has_pos_embed(self) -> bool:
        """True if the position embedding is in the cache."""
        return "hook_pos_embed" in self

    # The batch axis and the device

    def remove_batch_dim(self) -> Self:
        """Drops the batch axis of every activation, in place. Norms of each query and key have none, nor chosen experts.

        In a cache that was put together by hand, arrays whose first axis is longer than the batch are left as they are: a
        bias over positions, say.

        Returns:
            The cache itself.

        Raises:
            InputError: For a batch of more than one prompt.
        """
        if self.has_batch_dim:
            prompts = self._batch()
            if prompts != 1:
                name = next(name for name, value in self.cache_dict.items() if value.shape[:1] == (prompts,))
                raise InputError(f"cannot drop the batch axis of {name!r}: the batch holds {prompts} prompts.")
            self.cache_dict = {
                name: value if value.shape[:1] != (1,) or _joins_prompts(name, value) else value[0]
                for name, value in self.cache_dict.items()
            }
            self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: SliceInput) -> Self:
        """A new cache of some of the prompts. Arrays put there by hand that have another first axis stay as they are.

        Args:
            batch_slice: Which prompts; an int drops the batch axis.

        Raises:
            InputError: For a prompt that is not in the batch, when there is no batch axis, and where nothing in the cache tells
                how many prompts an activation is of.
        """
        taken = Slice(batch_slice)
        if not self.has_batch_dim and taken.mode != "identity":
            raise InputError("this cache has no batch axis to slice: it was removed.")
        sliced: dict[str, ArrayT] = {}
        prompts = self._batch()
        for name, value in self.cache_dict.items() if self.has_batch_dim else ():
            if _joins_prompts(name, value) and taken.mode != "identity":
                rows = np.arange(value.shape[0]).reshape(self._prompts(name), -1)
                sliced[name] = Slice(np.asarray(taken.apply(rows)).ravel()).apply(value)
            else:
                sliced[name] = taken.apply(value) if value.shape[:1] == (prompts,) else value
        other = type(self)(sliced or dict(self.cache_dict), self.model, self.has_batch_dim and taken.mode != "int")
        other.straight_through = self.straight_through
        if self.mask is not None:
            other.mask = self.mask[taken.indices(len(self.mask))] if self.has_batch_dim else self.mask
        return other

    def _batch(self) -> int:
        """The number of prompts: the length that most activations have in their first axis, of two as frequent the longer."""
        lengths = Counter(
            int(value.shape[0]) for name, value in self.items() if value.shape and not _joins_prompts(name, value)
        )
        return max(lengths, key=lambda length: (lengths[length], length), default=1)

    def _prompts(self, asked: str) -> int:
        """The number of prompts of the run; ``asked`` is the activation that does not tell."""
        for name, value in self.cache_dict.items():
            if not _joins_prompts(name, value):
                return int(value.shape[0])
        if self.mask is not None:
            return int(self.mask.shape[0])
        raise InputError(
            f"{asked!r} has prompts and positions in one axis, and nothing else in this cache tells how many prompts "
            "there were: cache another activation with it, 'hook_embed' say."
        )

    def toggle_autodiff(self, mode: bool = False) -> None:
        """Turns torch's autograd off, or on again, in the whole program (TransformerLens: the same name).

        The activations carry no gradients in either case: ``model.gradients`` computes those.

        Args:
            mode: False turns it off. That is all that arrays can have: on the NumPy face nothing changes.

        Raises:
            InputError: For True on the NumPy face.
        """
        self.model.border.toggle_autodiff(checked_number(mode, "mode", bool))

    def to(self, device: object) -> Self:
        """This cache: activations are always on the CPU.

        Args:
            device: "cpu" or torch's device of it.

        Returns:
            The cache itself.

        Raises:
            InputError: For any other device.
        """
        if str(device) not in ("cpu", "cpu:0"):
            raise InputError(f"the activations are on the CPU and stay there: cannot move them to {str(device)!r}.")
        return self


def _joins_prompts(name: str, value: UserArray) -> bool:
    """True if an activation has prompts and positions in one axis: a norm of each head's query or key, or chosen experts."""
    axes = BLOCK.get(split_name(name.removesuffix("_grad"))[1], ("",))
    return value.ndim == 2 and axes[0] in JOINT_AXES
