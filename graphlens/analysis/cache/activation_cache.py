"""ActivationCache: the activations of one run and everything that is computed from them."""

from __future__ import annotations

from typing import Generic

from graphlens.analysis.arrays import ArrayT
from graphlens.analysis.cache.activations import Activations
from graphlens.analysis.cache.components import ComponentMethods
from graphlens.analysis.cache.reader import Reader
from graphlens.analysis.cache.residual_stream import ResidualMethods


class ActivationCache(ResidualMethods[ArrayT], ComponentMethods[ArrayT], Activations[ArrayT], Generic[ArrayT]):
    """Activations by hook name, in firing order (TransformerLens's ActivationCache).

    Keys: a full name, ``"k6"``, ``"scale4ln1"``, ``("resid_pre", 3)``, ``("pattern", -1, "attn")`` or
    ``("embed", None)``. Values are arrays (tensors on the torch face) shaped as ``model.hook_points()`` lists them.

    Its methods compute in float32 at least, answer in the values' kind, and raise UnknownHookPoint naming the hook when
    names_filter left out what they need. Their slices are ``Slice`` arguments: None, an int (drops the axis), a tuple
    (start, stop), a list of indices. In the shapes of their results, *b is [b], or nothing without a batch axis, and p
    goes when ``pos_slice`` is an int.

    Args:
        cache_dict: The activations by hook name.
        model: The model that ran.
        has_batch_dim: Whether the activations have a batch axis.
    """

    @property
    def _reader(self) -> Reader[ArrayT]:
        """The activations as NumPy arrays, for the methods."""
        return Reader(self, self.model, self.has_batch_dim)
