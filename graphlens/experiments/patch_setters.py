"""TransformerLens's patch setters: functions that put a part of one activation into another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar


class Indexed(Protocol):
    """An array that can be read and edited by index."""

    def __getitem__(self, index: Any, /) -> Any: ...

    def __setitem__(self, index: Any, value: Any, /) -> None: ...


IndexedT = TypeVar("IndexedT", bound=Indexed)


class PatchSetter(Protocol):
    """A ``..._patch_setter`` function: TransformerLens's arguments and results."""

    def __call__(self, corrupted_activation: IndexedT, index: Sequence[int], clean_activation: IndexedT) -> IndexedT:
        """Puts a part of the clean activation into the corrupted one, and returns that."""


# What each setter of this module patches can also be said as a Site, so that sweeps over it recompute less: the fields of Site
# that its index gives, after the layer.
SITE_FIELDS: dict[Callable[..., Any], tuple[str, ...]] = {}


def _patch_setter(name: str, what: str, axis: int, **fields: str) -> PatchSetter:
    """The setter of that name.

    Args:
        name: Its name without ``_patch_setter``.
        what: What it patches.
        axis: The axis of the activation that its index begins with, after the layer.
        **fields: What that axis and those after it run over -> the field of Site that says the same.
    """

    def patch_setter(corrupted_activation: IndexedT, index: Sequence[int], clean_activation: IndexedT) -> IndexedT:
        _, *parts = index
        place = (*(slice(None),) * axis, *(part for part, _ in zip(parts, fields, strict=True)))
        corrupted_activation[place] = clean_activation[place]
        return corrupted_activation

    patch_setter.__name__ = patch_setter.__qualname__ = f"{name}_patch_setter"
    patch_setter.__doc__ = f"""Patches {what}: ``index`` is (layer, {", ".join(fields)}).

    Args:
        corrupted_activation: The activation of the run that is patched; changed in place.
        index: What is patched.
        clean_activation: The activation of the clean run.

    Returns:
        ``corrupted_activation``.
    """
    SITE_FIELDS[patch_setter] = tuple(fields.values())
    return patch_setter


layer_pos_patch_setter = _patch_setter("layer_pos", "a position", 1, position="position")
layer_pos_head_vector_patch_setter = _patch_setter(
    "layer_pos_head_vector", "a head's vector (q, k, v, z) at a position", 1, position="position", head="head"
)
layer_head_vector_patch_setter = _patch_setter("layer_head_vector", "a head's vectors at all positions", 2, head="head")
layer_head_pattern_patch_setter = _patch_setter("layer_head_pattern", "a head's whole pattern", 1, head="head")
layer_head_pos_pattern_patch_setter = _patch_setter(
    "layer_head_pos_pattern", "a head's pattern at a query's position", 1, head="head", destination="position"
)
layer_head_dest_src_pos_pattern_patch_setter = _patch_setter(
    "layer_head_dest_src_pos_pattern",
    "one entry of a head's pattern",
    1,
    head="head",
    destination="position",
    source="dims",
)
