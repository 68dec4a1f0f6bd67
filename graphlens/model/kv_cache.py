"""Keys and values of the tokens a model has seen, kept between calls where they were computed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import ArrayInput, UserArray
from graphlens.edits.gate import Window
from graphlens.errors import InputError, InputTypeError, checked_number, warn
from graphlens.file.io_names import ATTENTION_MASK, KEY_AND_VALUE, POSITION_IDS, past_input, present_output
from graphlens.file.model_config import ModelConfig
from graphlens.model.kv_entry import KEY, VALUE, border_of, checked_past
from graphlens.model.kv_entry import KeyValueCacheEntry as KeyValueCacheEntry
from graphlens.model.limits import longest
from graphlens.runtime.types import Feed

if TYPE_CHECKING:
    from graphlens.model.border import Border
    from graphlens.model.config import HookedTransformerConfig


class KeyValueCache:
    """What ``forward(past_kv_cache=...)`` reads and extends (TransformerLens: ``TransformerLensKeyValueCache``).

    ``KeyValueCache.init_cache(model.cfg, batch_size=...)`` makes an empty one. A cache belongs to the batch that it was made
    for, and from its first run on to the file that filled it: the keys of another file mean something else, however alike the
    two are. Of a cache made of entries only the shapes can be checked before its first run.

    Args:
        entries: The keys and values of each layer, each a KeyValueCacheEntry.
        previous_attention_mask: int [b, past], 1 at real tokens, 0 at padding: of the positions that the entries hold.
        frozen: True if runs read the cache and do not extend it.

    Attributes:
        entries: The layers' keys and values; ``cache[2]`` is ``cache.entries[2]``. They can be read and set.
        config: The architecture of the model that it is for; None for a cache made of entries.
        mask: ``previous_attention_mask`` as int64 array.
        frozen: See above.
        prompt: How many positions the first run put in, or the entries that it was made of.
        owner: A digest of the file that filled it; "" while none has.

    Raises:
        InputError: For entries and a mask of another form.
    """

    config: ModelConfig | None = None
    frozen: bool = False
    owner: str = ""

    def __init__(
        self,
        entries: Sequence[KeyValueCacheEntry],
        previous_attention_mask: ArrayInput | UserArray,
        frozen: bool = False,
    ) -> None:
        strange = next((entry for entry in entries if not isinstance(entry, KeyValueCacheEntry)), None)
        if strange is not None or not entries:
            raise InputTypeError(
                "entries are a list of graphlens's KeyValueCacheEntry, one for each layer, not "
                f"{'an empty one' if strange is None else f'of {type(strange).__name__}'}. KeyValueCache.init_cache(model.cfg) "
                "makes an empty cache."
            )
        self.entries = list(entries)
        self.mask: npt.NDArray[np.int64] = checked_past(previous_attention_mask)
        self.frozen = checked_number(frozen, "frozen", bool)
        self.prompt = self.length

    @classmethod
    def init_cache(cls, cfg: ModelConfig | HookedTransformerConfig, device: object = None, batch_size: int = 1) -> Self:
        """An empty cache. TransformerLens: the same name.

        Args:
            cfg: ``model.cfg``.
            device: TransformerLens's; changes nothing.
            batch_size: The number of sequences.

        Returns:
            A cache for that many sequences.
        """
        batch_size = checked_number(batch_size, "batch_size", least=1)
        entries = [KeyValueCacheEntry.init_cache_entry(cfg, device, batch_size) for _ in range(cfg.n_layers)]
        cache = cls(entries, np.zeros((batch_size, 0), np.int64))
        cache.config = cfg if isinstance(cfg, ModelConfig) else cfg.architecture
        return cache

    def __copy__(self) -> Self:
        other = type(self).__new__(type(self))
        # Runs put new values in, and leave those that are there.
        other.__dict__.update(self.__dict__, entries=[copy.copy(entry) for entry in self.entries])
        return other

    def __getitem__(self, idx: int) -> KeyValueCacheEntry:
        """The entry of a layer."""
        return self.entries[idx]

    def __repr__(self) -> str:
        held = f"{self.length} positions of {self.batch_size} sequences in {len(self.entries)} layers"
        return f"{type(self).__name__} of {held}{', frozen' if self.frozen else ''}"

    @property
    def batch_size(self) -> int:
        """The number of sequences."""
        return int(self.mask.shape[0])

    @property
    def length(self) -> int:
        """The number of positions held, padding included."""
        return int(self.mask.shape[1])

    @property
    def present(self) -> dict[str, Feed]:
        """``present.N.key`` and ``present.N.value`` -> what is held of them, [b, heads, past, d_head]."""
        return {
            present_output(layer, part): entry.held(part)
            for layer, entry in enumerate(self.entries)
            for part in KEY_AND_VALUE
            if entry.length
        }

    @property
    def previous_attention_mask(self) -> UserArray:
        """int64 [b, past], 1 at real tokens, 0 at padding; a tensor on the torch face. It can be written into and set."""
        return self._border.to_user(self.mask)

    @previous_attention_mask.setter
    def previous_attention_mask(self, value: ArrayInput | UserArray) -> None:
        self.mask = checked_past(value)

    def append_attention_mask(self, attention_mask: ArrayInput | UserArray) -> UserArray:
        """Adds the mask of more positions, as a run does. TransformerLens: the same name.

        A run calls for keys and values of every position that the mask counts: whoever adds to one adds to the entries too.

        Args:
            attention_mask: int [b, new], 1 at real tokens, 0 at padding.

        Returns:
            The mask of all positions, [b, past + new]. A frozen cache itself stays as it is.

        Raises:
            InputError: For another form, or another number of sequences.
        """
        new = checked_past(attention_mask)
        if len(new) != self.batch_size:
            raise InputError(f"the mask is of {len(new)} sequences, and the cache of {self.batch_size}.")
        whole = np.concatenate([self.mask, new], 1)
        if not self.frozen:
            self.mask = whole
        return self._border.to_user(whole)

    def freeze(self) -> None:
        """Makes runs read the cache without extending it, from now on."""
        self._freeze(True)

    def unfreeze(self) -> None:
        """Makes runs extend the cache again, from now on."""
        self._freeze(False)

    def _freeze(self, frozen: bool) -> None:
        self.frozen = frozen
        for entry in self.entries:
            entry.frozen = frozen

    def check(self, cfg: ModelConfig, batch: int, new: int, owner: str) -> None:
        """Refuses a run that the cache is not for.

        Args:
            cfg: The architecture of the model that is to run.
            batch: How many sequences the run has.
            new: How many positions it adds.
            owner: The digest of the model's file.

        Raises:
            InputError: If the cache is of another model or batch, has no room for the positions, or holds keys that are
                rotated otherwise than those of so long an input.
        """
        made_for = self.config or cfg
        ours, theirs = ((c.n_layers, c.n_key_value_heads, c.d_head, c.model_name, c.dtype) for c in (cfg, made_for))
        if ours != theirs:
            raise InputError(
                f"this cache was made for {made_for.model_name} ({theirs[0]} layers, {theirs[1]} heads of {theirs[2]}), "
                f"and the model is {cfg.model_name} ({ours[0]} layers, {ours[1]} heads of {ours[2]})."
            )
        if self.owner not in ("", owner):
            raise InputError(
                f"this cache was filled by another model named {made_for.model_name}, of the same shape (other weights, "
                "other processing, an edited graph): make a cache per model."
            )
        if batch != self.batch_size:
            raise InputError(
                f"the cache holds {self.batch_size} sequences and the input {batch}: make a cache per batch."
            )
        if self.length + new > cfg.n_ctx:
            raise InputError(f"{self.length} cached positions and {new} new ones are too many: {longest(cfg)}.")
        self._check_entries(cfg)
        held, short = int(self.mask.sum(-1).max(initial=0)), cfg.rotary_short
        if short is not None and 0 < held <= short < held + new:
            raise InputError(
                f"{cfg.model_name} rotates inputs of more than {short} tokens by other frequencies, and the {held} cached keys "
                "are rotated as those of a short one: run all tokens again with an empty cache, as generate() does."
            )

    def _check_entries(self, cfg: ModelConfig) -> None:
        """Refuses entries that a user put in and that the model cannot read, or that it could extend in part only."""
        if len(self.entries) != cfg.n_layers:
            raise InputError(f"the cache has {len(self.entries)} entries, and {cfg.model_name} {cfg.n_layers} layers.")
        frozen = next((layer for layer, entry in enumerate(self.entries) if entry.frozen), None)
        if frozen is not None and not self.frozen:
            raise InputError(
                f"entry {frozen} of the cache is frozen and the cache is not: freeze() and unfreeze() are for both."
            )
        for layer, entry in enumerate(self.entries):
            if entry.length or not self.length:
                entry.ensure_fits(layer, cfg, self.batch_size)
        if cfg.rotary_dim is not None and any(entry.given and entry.length for entry in self.entries):
            warn(
                f"keys were put into this cache by hand. Those of {cfg.model_name} are rotated to the positions at which they "
                "were computed, and are right at the same places only (TransformerLens holds them before the rotation)."
            )

    def window(self, new: int, horizon: int | None = None) -> Window:
        """Where new positions lie in the sequences of this cache.

        Args:
            new: How many positions a run adds.
            horizon: To how many positions the sequences may grow; None for no further than this run.

        Returns:
            The window, for edits by position.
        """
        prompt = self.prompt or new
        return Window(self.batch_size, self.length, new, self.length + new if horizon is None else horizon, prompt)

    def feeds(self, layers: range, mask: npt.NDArray[np.int64]) -> dict[str, Feed]:
        """The feeds of a run over new positions: keys and values so far, the whole mask, and positions.

        Args:
            layers: The blocks that run.
            mask: int64 [b, new], 1 at real tokens.

        Returns:
            Input name -> array, or what an earlier run left on its device.

        Raises:
            InputError: If an earlier run skipped one of the layers.
        """
        total = np.concatenate([self.mask, mask], 1)
        feeds: dict[str, Feed] = {
            ATTENTION_MASK: total,
            POSITION_IDS: np.maximum(total.cumsum(-1) - 1, 0)[:, self.length :],
        }
        length = self.length
        for layer in layers:
            entry = self.entries[layer]
            if entry.length != length:
                held = f"{entry.length} of {self.length} positions" if entry.length else "nothing"
                raise InputError(
                    f"the cache holds {held} of layer {layer}: it was filled by a run that skipped it"
                    f"{', or its previous_attention_mask is of other positions' if entry.length else ''}."
                )
            for part in KEY_AND_VALUE:
                feeds[past_input(layer, part)] = entry.held(part)
        return feeds

    def extend(self, present: Mapping[str, Feed], mask: npt.NDArray[np.int64], owner: str = "") -> None:
        """Takes over what a run returned; does nothing while the cache is frozen.

        Args:
            present: Keys and values of all positions so far, by output name.
            mask: int64 [b, new], that of the run's own positions.
            owner: The digest of the model's file.
        """
        if not self.frozen:
            self.owner = owner
            self.prompt = self.prompt or int(mask.shape[1])
            self.mask = np.concatenate([self.mask, mask], 1)
            length = self.length
            for layer, entry in enumerate(self.entries):
                key, value = present.get(present_output(layer, KEY)), present.get(present_output(layer, VALUE))
                if key is not None and value is not None:
                    entry.put(key, value, length)

    @property
    def _border(self) -> Border[UserArray]:
        return border_of(any(entry.tensors for entry in self.entries))


# As TransformerLens calls it: 2.x and 3.x.
HookedTransformerKeyValueCache = KeyValueCache
HookedTransformerKeyValueCacheEntry = KeyValueCacheEntry
TransformerLensKeyValueCache = KeyValueCache
TransformerLensKeyValueCacheEntry = KeyValueCacheEntry
