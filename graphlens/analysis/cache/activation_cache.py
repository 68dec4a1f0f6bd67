"""ActivationCache: the activations of one run and everything that is computed from them."""

from __future__ import annotations

from graphlens.analysis.cache.components import ComponentMethods


class ActivationCache(ComponentMethods):
    """Activations by hook name, in firing order (TransformerLens's ActivationCache).

    Keys: a full name, ``"k6"``, ``"scale4ln1"``, ``("resid_pre", 3)``, ``("pattern", -1, "attn")`` or
    ``("embed", None)``. Values are arrays (tensors on the torch face) shaped as ``model.hook_points()`` lists them.

    Its methods compute in float32 at least, answer in the values' kind, and raise UnknownHookPoint naming the hook when
    names_filter left out what they need. Their slices are ``Slice`` arguments: None, an int (drops the axis), a tuple
    (start, stop), a list of indices.
    """
