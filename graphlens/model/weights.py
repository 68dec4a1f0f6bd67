"""A model's weights under TransformerLens's names, with zeros for the biases that a checkpoint lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from graphlens.analysis.arrays import Array, ArrayInput, as_array, working
from graphlens.errors import InputAttributeError, InputError, ModelFileError
from graphlens.file.names import POSITION_EMBEDDINGS, in_block

if TYPE_CHECKING:
    from graphlens.engine.engine import Engine

# A bias that a checkpoint lacks is zero, as in TransformerLens; its shape in the config's terms.
_BIASES: Mapping[str, tuple[str, ...]] = {
    "b_Q": ("n_heads", "d_head"),
    "b_K": ("n_key_value_heads", "d_head"),
    "b_V": ("n_key_value_heads", "d_head"),
    "b_O": ("d_model",),
    "b_in": ("d_mlp",),
    "b_out": ("d_model",),
    "b_U": ("d_vocab_out",),
}
# Weights of which several heads share one where there are fewer keys and values than queries. Under these names
# TransformerLens has them once for each head; as they are stored they have an underscore before.
_SHARED = ("W_K", "W_V", "b_K", "b_V")
# Where embeddings are narrower than the residual stream (OPT-350m): the two matrices that TransformerLens's is the product of.
_PRODUCTS: Mapping[str, tuple[str, str]] = {
    "embed.W_E": ("embed.W_tokens", "embed.W_project"),
    "unembed.W_U": ("unembed.W_project", "unembed.W_tokens"),
}


class Weights:
    """Weights by TransformerLens name, read-only: writing into one would not change what the model computes.

    Where several heads share a key and a value, ``attn.W_K``, ``W_V``, ``b_K`` and ``b_V`` have them once for each head, as
    copies; ``attn._W_K`` and so on are what is stored. Where embeddings are narrower than the residual stream, ``embed.W_E`` and
    ``unembed.W_U`` are products, computed when they are first asked for.

    Args:
        engine: The model's engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._made: dict[str, Array] = {}

    @property
    def stored(self) -> Mapping[str, Array]:
        """The weights that the model computes with: views of the mapped files, or of what they were set to."""
        return self._engine.weights

    @property
    def _group(self) -> int:
        """How many heads share a key and a value."""
        config = self._engine.manifest.config
        return config.n_heads // config.n_key_value_heads

    def _split(self, name: str) -> tuple[str, int]:
        """(the name that a weight is stored by, how often its heads are repeated under this one)."""
        prefix, _, leaf = name.rpartition(".")
        if self._group > 1 and leaf in _SHARED:
            return name, self._group
        if self._group > 1 and leaf.startswith("_") and leaf[1:] in _SHARED:
            return f"{prefix}.{leaf[1:]}", 1
        return name, 1

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        stored, _ = self._split(name)
        if stored in self.stored or self._is_product(stored):
            return True
        return stored.rpartition(".")[2] in _BIASES and _matrix_of(stored) in self

    def _is_product(self, name: str) -> bool:
        """True for a weight that is the product of two that are stored, and is not stored itself."""
        return name in _PRODUCTS and name not in self.stored and all(part in self.stored for part in _PRODUCTS[name])

    def __getitem__(self, name: str) -> Array:
        """A weight; zeros for a bias that the checkpoint lacks.

        Raises:
            AttributeError: For a name that this model has no weight of.
        """
        stored, times = self._split(name)
        found = self._stored_or_zeros(stored, name)
        if times > 1:
            found = np.repeat(found, times, axis=0)
            found.flags.writeable = False
        return found

    def _stored_or_zeros(self, name: str, asked: str) -> Array:
        """A weight by the name that it is stored by; ``asked`` is what an error calls it."""
        stored, config = self.stored, self._engine.manifest.config
        if name in stored:
            # A model opened with a lower n_ctx has so many positions.
            return stored[name][: config.n_ctx] if name in POSITION_EMBEDDINGS else stored[name]
        if name not in self:
            raise InputAttributeError(f"this model has no weight {asked!r}. List what it has with list(model.weights).")
        if self._is_product(name):
            if name not in self._made:
                first, second = (working(stored[part]) for part in _PRODUCTS[name])
                self._made[name] = (first @ second).astype(stored[_PRODUCTS[name][0]].dtype, copy=False)
                self._made[name].flags.writeable = False
            return self._made[name]
        shape = tuple(int(getattr(config, size)) for size in _BIASES[name.rpartition(".")[2]])
        matrix = _matrix_of(name)
        zeros = np.zeros(shape, stored[_PRODUCTS[matrix][0] if self._is_product(matrix) else matrix].dtype)
        zeros.flags.writeable = False
        return zeros

    def ensure_known(self, *names: str) -> None:
        """Refuses to go on without weights that an adopted file has and that were not found in it.

        Args:
            names: Weights that are left out where the model has none.

        Raises:
            InputError: One of them is there, and its content is not known.
        """
        adopted = self._engine.manifest.adopted
        for name in names:
            if adopted is not None and name in adopted.missing:
                raise InputError(
                    f"the weight {name!r} of the adopted file {adopted.file} is not known ({adopted.missing[name]}), so "
                    "what it takes part in cannot be computed here. Read it from a run, at the hook points behind it."
                )

    def names(self) -> list[str]:
        """Every weight's name in TransformerLens's state dict, biases that are zeros included."""
        names = dict.fromkeys(self.stored)
        for name in list(names):
            prefix, _, leaf = name.rpartition(".")
            if f"b_{leaf[2:]}" in _BIASES and leaf.startswith("W_"):
                names[f"{prefix}.b_{leaf[2:]}"] = None
        return [self._once(name) for name in names]

    def _once(self, name: str) -> str:
        """The name under which a weight counts once, and not for each head."""
        prefix, _, leaf = name.rpartition(".")
        return f"{prefix}._{leaf}" if self._group > 1 and leaf in _SHARED else name

    def canonical(self, name: str) -> str:
        """The name under which ``names`` has a weight, of those that TransformerLens's state dicts may have it by.

        Args:
            name: "blocks.0.attn._W_K", say, also where no heads share keys and values.
        """
        prefix, _, leaf = name.rpartition(".")
        if self._group == 1 and leaf.startswith("_") and leaf[1:] in _SHARED:
            return f"{prefix}.{leaf[1:]}"
        return self._once(name)

    def stacked(self, name: str) -> Array:
        """A weight of every block, as a copy.

        Args:
            name: Its name in a block ("attn.W_Q").

        Returns:
            [n_layers, ...].

        Raises:
            AttributeError: If the blocks have no weight of that name.
        """
        every = [self[in_block(layer, name)] for layer in range(self._engine.manifest.config.n_layers)]
        if len({weight.shape for weight in every}) > 1:
            shapes = ", ".join(str(list(weight.shape)) for weight in every)
            raise ModelFileError(f"{self._engine.path}: its blocks have {name} of different shapes: {shapes}.")
        return np.stack(every)

    def computing(self, name: str) -> Array:
        """``stacked`` in float32 at least: linear algebra has no half precision.

        Args:
            name: Its name in a block.
        """
        return working(self.stacked(name))

    def with_others(self, given: Mapping[str, ArrayInput]) -> Engine:
        """An engine that computes with other weights; those that were set before stay set.

        Args:
            given: TransformerLens name -> the weight. Zeros for a bias that the model lacks are what it has already. Weights
                that several heads share are given once for each of them all, or as they are stored.

        Raises:
            InputError: For a weight that does not fit; see ``Engine.with_weights``. For what is no dict of arrays.
        """
        if not isinstance(given, Mapping):
            raise InputError(f"weights are given as a dict of name -> array, not as {type(given).__name__}.")
        new, told = dict(self._engine.replaced), dict[str, str]()
        for asked, value in given.items():
            if not isinstance(asked, str):
                raise InputError(f"a weight's name is text, not {type(asked).__name__}.")
            try:
                array = as_array(value)
            except (ValueError, TypeError) as error:
                raise InputError(f"{asked!r} was to be set to what cannot be read as an array ({error}).") from error
            name, times = self._split(asked)
            if told.setdefault(name, asked) != asked:
                raise InputError(f"{told[name]!r} and {asked!r} are one weight: set one of them.")
            array = self.as_stored(asked, array) if times > 1 else array
            if name in self.stored or name not in self:
                new[name] = array
                continue
            if self._is_product(name):
                parts = " and ".join(map(repr, _PRODUCTS[name]))
                raise InputError(f"{asked!r} is the product of {parts} in this model: set these.")
            zeros = self._stored_or_zeros(name, asked)
            if array.shape != zeros.shape or np.any(array):
                raise InputError(
                    f"{asked!r} counts as {list(zeros.shape)} zeros: this model has no such bias, and its graph adds none."
                )
        return self._engine.with_weights(new)

    def as_stored(self, name: str, array: Array) -> Array:
        """A weight that is given for each head, as it is stored: once for all heads that share it.

        Args:
            name: What the user calls it.
            array: One that heads share; whatever has not an entry for each head stays as it is.

        Raises:
            InputError: The heads that share it are given different ones.
        """
        config = self._engine.manifest.config
        if self._group == 1 or array.ndim == 0 or len(array) != config.n_heads:
            return array
        heads = array.reshape(config.n_key_value_heads, self._group, *array.shape[1:])
        if not np.array_equal(heads, np.repeat(heads[:, :1], self._group, axis=1)):
            prefix, _, leaf = name.rpartition(".")
            raise InputError(
                f"{name!r}: {self._group} heads share each key and value in this model, and what it was to be set to differs "
                f"between them. Set '{prefix}._{leaf}', which has {config.n_key_value_heads} heads."
            )
        return heads[:, 0]


def _matrix_of(bias: str) -> str:
    prefix, _, leaf = bias.rpartition(".")
    return f"{prefix}.W_{leaf[2:]}"


def qk_factors(weight: Callable[[str], Array]) -> tuple[Array, Array]:
    """(W_Q, W_K^T) of each head. ``weight`` gives a weight of attention by the end of its name ("W_Q")."""
    return weight("W_Q"), np.swapaxes(weight("W_K"), -2, -1)


def ov_factors(weight: Callable[[str], Array]) -> tuple[Array, Array]:
    """(W_V, W_O) of each head. ``weight`` gives a weight of attention by the end of its name ("W_V")."""
    return weight("W_V"), weight("W_O")
