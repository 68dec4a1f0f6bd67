"""Keys and values of the tokens a model has seen, kept between calls where they were computed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from graphlens.edits.gate import Window
from graphlens.errors import InputError, checked_number
from graphlens.file.io_names import ATTENTION_MASK, KEY_AND_VALUE, POSITION_IDS, past_input, present_output
from graphlens.file.model_config import ModelConfig
from graphlens.model.limits import longest

if TYPE_CHECKING:
    from graphlens.model.config import HookedTransformerConfig

Array = npt.NDArray[Any]


@dataclass
class KeyValueCache:
    """What ``forward(past_kv_cache=...)`` reads and extends (TransformerLens: ``TransformerLensKeyValueCache``).

    A cache belongs to the batch that it was made for, and from its first run on to the file that filled it: the keys of
    another file mean something else, however alike the two are.

    Attributes:
        config: The architecture of the model that it is for.
        mask: int64 [b, past], 1 at real tokens, 0 at padding.
        present: ``present.N.key`` and ``present.N.value`` -> ONNX Runtime's value [b, heads, past, d_head].
        frozen: True if runs read the cache and do not extend it.
        prompt: How many positions the first run put in.
        owner: A digest of the file that filled it; "" while it is empty.
    """

    config: ModelConfig
    mask: npt.NDArray[np.int64]
    present: dict[str, Any] = field(default_factory=dict)
    frozen: bool = False
    prompt: int = 0
    owner: str = ""

    @classmethod
    def init_cache(cls, cfg: ModelConfig | HookedTransformerConfig, device: Any = None, batch_size: int = 1) -> Self:
        """An empty cache. TransformerLens: the same name.

        Args:
            cfg: ``model.cfg``.
            device: TransformerLens's; changes nothing.
            batch_size: The number of sequences.

        Returns:
            A cache for that many sequences.
        """
        batch_size = checked_number(batch_size, "batch_size", least=1)
        architecture = cfg if isinstance(cfg, ModelConfig) else cfg.architecture
        return cls(architecture, np.zeros((batch_size, 0), np.int64))

    def __getstate__(self) -> dict[str, object]:
        # Pickled and copied as arrays in main memory: ONNX Runtime's values can be neither. Runs take both.
        held = {name: value if isinstance(value, np.ndarray) else value.numpy() for name, value in self.present.items()}
        return {**self.__dict__, "present": held}

    def __copy__(self) -> Self:
        return replace(self, present=dict(self.present))  # runs put new values in, and leave those that are there

    @property
    def batch_size(self) -> int:
        """The number of sequences."""
        return int(self.mask.shape[0])

    @property
    def length(self) -> int:
        """The number of positions held, padding included."""
        return int(self.mask.shape[1])

    def freeze(self) -> None:
        """Makes runs read the cache without extending it, from now on."""
        self.frozen = True

    def unfreeze(self) -> None:
        """Makes runs extend the cache again, from now on."""
        self.frozen = False

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
        ours, theirs = ((c.n_layers, c.n_key_value_heads, c.d_head, c.model_name, c.dtype) for c in (cfg, self.config))
        if ours != theirs:
            raise InputError(
                f"this cache was made for {self.config.model_name} ({theirs[0]} layers, {theirs[1]} heads of {theirs[2]}), "
                f"and the model is {cfg.model_name} ({ours[0]} layers, {ours[1]} heads of {ours[2]})."
            )
        if self.owner not in ("", owner):
            raise InputError(
                f"this cache was filled by another model named {self.config.model_name}, of the same shape (other weights, "
                "other processing, an edited graph): make a cache per model."
            )
        if batch != self.batch_size:
            raise InputError(
                f"the cache holds {self.batch_size} sequences and the input {batch}: make a cache per batch."
            )
        if self.length + new > cfg.n_ctx:
            raise InputError(f"{self.length} cached positions and {new} new ones are too many: {longest(cfg)}.")
        held, short = int(self.mask.sum(-1).max(initial=0)), cfg.rotary_short
        if short is not None and 0 < held <= short < held + new:
            raise InputError(
                f"{cfg.model_name} rotates inputs of more than {short} tokens by other frequencies, and the {held} cached keys "
                "are rotated as those of a short one: run all tokens again with an empty cache, as generate() does."
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

    def feeds(self, layers: range, mask: npt.NDArray[np.int64]) -> dict[str, Any]:
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
        feeds: dict[str, Any] = {
            ATTENTION_MASK: total,
            POSITION_IDS: np.maximum(total.cumsum(-1) - 1, 0)[:, self.length :],
        }
        cfg = self.config
        nothing = np.zeros((self.batch_size, cfg.n_key_value_heads, self.length, cfg.d_head), cfg.dtype)
        for layer in layers:
            for part in KEY_AND_VALUE:
                held = self.present.get(present_output(layer, part))
                if held is None and self.length:
                    raise InputError(
                        f"the cache holds nothing of layer {layer}: it was filled by a run that skipped it."
                    )
                feeds[past_input(layer, part)] = nothing if held is None else held
        return feeds

    def extend(self, present: dict[str, Any], mask: npt.NDArray[np.int64], owner: str = "") -> None:
        """Takes over what a run returned; does nothing while the cache is frozen.

        Args:
            present: Keys and values of all positions so far, by output name.
            mask: int64 [b, new], that of the run's own positions.
            owner: The digest of the model's file.
        """
        if not self.frozen:
            self.owner = owner
            self.prompt = self.prompt or int(mask.shape[1])
            self.present = dict(present)
            self.mask = np.concatenate([self.mask, mask], 1)


# As TransformerLens calls it: 2.x and 3.x.
HookedTransformerKeyValueCache = KeyValueCache
TransformerLensKeyValueCache = KeyValueCache
