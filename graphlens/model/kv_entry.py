"""The keys and values of one layer in a KV cache, as runs hold them and as users see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Self, cast

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import Array, ArrayInput, Tensor, UserArray, as_array, is_tensor
from graphlens.errors import InputError, InputShapeError, checked_number
from graphlens.file.io_names import KEY_AND_VALUE
from graphlens.file.manifest import ModelConfig
from graphlens.runtime.types import Feed

if TYPE_CHECKING:
    from graphlens.model.border import Border

KEY, VALUE = KEY_AND_VALUE


class _Held(NamedTuple):
    """What a run left, [b, heads, past, d_head], wherever it was computed."""

    value: Feed
    length: int  # that of past

    @property
    def array(self) -> Array:
        """It in main memory; a copy, since shallow copies of a cache share what runs left."""
        return np.array(self.value if isinstance(self.value, np.ndarray) else self.value.numpy())

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape as users see it, [b, past, heads, d_head]."""
        batch, heads, past, size = self.value.shape if isinstance(self.value, np.ndarray) else self.value.shape()
        return batch, past, heads, size


class KeyValueCacheEntry:
    """The keys and values that a KV cache holds of one layer (TransformerLens: ``TransformerLensKeyValueCacheEntry``).

    What is assigned to ``past_keys`` and ``past_values``, and what is written into them in place, is what the next run reads.
    Keys of a model with rotary positions are rotated to the positions at which they were computed, and serve no others;
    TransformerLens holds them before the rotation.

    Args:
        past_keys: Keys [b, past, kv heads, d_head], an array or a tensor.
        past_values: Values of the same shape.
        frozen: True if runs read the entry and do not extend it.

    Attributes:
        frozen: See above.
        given: True if the user put keys or values in that no run has extended since.
    """

    frozen: bool = False

    def __init__(
        self, past_keys: ArrayInput | UserArray, past_values: ArrayInput | UserArray, frozen: bool = False
    ) -> None:
        self.frozen = frozen
        self._tensors = is_tensor(past_keys) or is_tensor(past_values)
        self._parts: dict[str, _Held | Array | Tensor] = {}
        self.given = True
        self.past_keys, self.past_values = past_keys, past_values

    @classmethod
    def init_cache_entry(cls, cfg: ModelConfig, device: object = None, batch_size: int = 1) -> Self:
        """The entry of a layer that has seen nothing. TransformerLens: the same name.

        Args:
            cfg: ``model.cfg``. On the torch face the entry then gives tensors.
            device: TransformerLens's; changes nothing.
            batch_size: The number of sequences.

        Returns:
            An entry of no positions.
        """
        batch_size = checked_number(batch_size, "batch_size", least=1)
        dtype = str(cfg.dtype)
        nothing = np.zeros((batch_size, 0, cfg.n_key_value_heads, cfg.d_head), dtype.removeprefix("torch."))
        entry = cls(nothing, nothing)
        entry._tensors = dtype.startswith("torch.")
        entry.put(nothing.swapaxes(1, 2), nothing.swapaxes(1, 2), 0)
        return entry

    # As users see it

    @property
    def past_keys(self) -> UserArray:
        """The keys so far, [b, past, kv heads, d_head]; a tensor on the torch face."""
        return self._shown(KEY)

    @past_keys.setter
    def past_keys(self, value: ArrayInput | UserArray) -> None:
        self._set(KEY, value, "past_keys")

    @property
    def past_values(self) -> UserArray:
        """The values so far, of the same shape."""
        return self._shown(VALUE)

    @past_values.setter
    def past_values(self, value: ArrayInput | UserArray) -> None:
        self._set(VALUE, value, "past_values")

    def append(self, new_keys: UserArray, new_values: UserArray) -> tuple[UserArray, UserArray]:
        """Adds keys and values of more positions. TransformerLens: the same name.

        Args:
            new_keys: [b, new, kv heads, d_head].
            new_values: The same for values.

        Returns:
            (keys, values) of all positions. A frozen entry itself stays as it is.

        Raises:
            InputError: For what does not fit what the entry holds.
        """
        both = []
        for part, new in ((KEY, new_keys), (VALUE, new_values)):
            held, added = self._array(part), as_array(new)
            if added.ndim != 4 or added.shape[::2] != held.shape[::2] or added.shape[3] != held.shape[3]:
                raise InputShapeError(
                    f"new {part}s of shape {list(added.shape)} do not go after those held, {list(held.shape)}: "
                    "[batch, pos, head, d_head] is wanted, of which only the positions may differ."
                )
            both.append(self._to_user(np.concatenate([held, added.astype(held.dtype, copy=False)], 1)))
        if not self.frozen:
            self._parts, self.given = dict(zip(KEY_AND_VALUE, both, strict=True)), True
        return both[0], both[1]

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self.length} positions{', frozen' if self.frozen else ''}"

    # As runs hold it

    @property
    def tensors(self) -> bool:
        """True if keys and values are shown as tensors."""
        return self._tensors

    @property
    def length(self) -> int:
        """The number of positions held."""
        held = self._parts[KEY]
        return held.length if isinstance(held, _Held) else int(as_array(held).shape[1])

    def held(self, part: str) -> Feed:
        """Keys or values as a run is fed with them, [b, heads, past, d_head].

        Args:
            part: "key" or "value".
        """
        found = self._parts[part]
        return found.value if isinstance(found, _Held) else np.ascontiguousarray(self._array(part).swapaxes(1, 2))

    def put(self, key: Feed, value: Feed, length: int) -> None:
        """Takes over what a run left, keys and values of all positions so far, unless the entry is frozen.

        Args:
            key: [b, heads, past, d_head].
            value: The same for values.
            length: How many positions they are.
        """
        if not self.frozen:
            self._parts, self.given = {KEY: _Held(key, length), VALUE: _Held(value, length)}, False

    def ensure_fits(self, layer: int, cfg: ModelConfig, batch: int) -> None:
        """Refuses keys and values that a user put in and that are not the model's.

        Args:
            layer: Which layer's they are.
            cfg: The model's architecture.
            batch: The number of sequences.

        Raises:
            InputError: For another shape or dtype.
        """
        wanted = (batch, self.length, cfg.n_key_value_heads, cfg.d_head)
        for part, found in self._parts.items():
            dtype = cfg.dtype if isinstance(found, _Held) else str(as_array(found).dtype)
            if self._shape(part) != wanted or dtype != cfg.dtype:
                raise InputShapeError(
                    f"the cache's {part}s of layer {layer} are {dtype} {list(self._shape(part))}; with {cfg.model_name} and this "
                    f"batch they must be {cfg.dtype} {list(wanted)}: [batch, past, kv heads, d_head]."
                )

    def __copy__(self) -> Self:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__, _parts=dict(self._parts))
        return other

    def __getstate__(self) -> dict[str, object]:
        # Pickled and copied as arrays in main memory: ONNX Runtime's values can be neither. Runs take both.
        parts = {
            name: _Held(part.array, part.length) if isinstance(part, _Held) else part
            for name, part in self._parts.items()
        }
        return {**self.__dict__, "_parts": parts}

    def _to_user(self, array: Array) -> Array | Tensor:
        """An array, or on the torch face a tensor over its memory."""
        return cast("Array | Tensor", border_of(self._tensors).to_user(array))

    def _shape(self, part: str) -> tuple[int, ...]:
        """[b, past, heads, d_head] of what is held."""
        found = self._parts[part]
        return found.shape if isinstance(found, _Held) else as_array(found).shape

    def _array(self, part: str) -> Array:
        """Keys or values as an array [b, past, heads, d_head]."""
        found = self._parts[part]
        return found.array.swapaxes(1, 2) if isinstance(found, _Held) else as_array(found)

    def _shown(self, part: str) -> UserArray:
        """Keys or values in the user's kind of array; from now on that one is what runs read."""
        found = self._parts[part]
        if isinstance(found, _Held):
            found = self._parts[part] = self._to_user(self._array(part))
        return found

    def _set(self, part: str, value: ArrayInput | UserArray, name: str) -> None:
        array = as_array(value)
        if array.ndim != 4 or array.dtype.kind != "f":
            raise InputShapeError(
                f"{name} are numbers [batch, past, kv heads, d_head], not {array.dtype} of shape {list(array.shape)}."
            )
        self._parts[part], self.given = value if isinstance(value, np.ndarray) or is_tensor(value) else array, True


def border_of(tensors: bool) -> Border[UserArray]:
    """How arrays cross to a user of the torch face, or of the other one."""
    if tensors:
        from graphlens.model.torch_border import TorchBorder

        return cast("Border[UserArray]", TorchBorder())
    from graphlens.model.border import NumpyBorder

    return cast("Border[UserArray]", NumpyBorder())


def checked_past(value: ArrayInput | UserArray) -> npt.NDArray[np.int64]:
    """A mask of positions in a cache as int64 [b, past], 1 at real tokens; over the user's own memory where it is int64."""
    mask = as_array(value)
    if mask.ndim != 2 or mask.dtype.kind not in "iub" or not np.isin(mask, (0, 1)).all():
        raise InputError(
            f"the attention mask of a cache is whole numbers [batch, past], 1 at real tokens and 0 at padding, not {mask.dtype} "
            f"of shape {list(mask.shape)}."
        )
    return mask.astype(np.int64, copy=False)
