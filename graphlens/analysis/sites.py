"""The places that a sweep patches: one by one, or a grid of them over layers, positions and heads."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from graphlens.analysis.arrays import ArrayInput
from graphlens.edits.kinds import Patch, Selection
from graphlens.errors import InputError, checked_number
from graphlens.file.names import get_act_name, in_block, split_name

# The grids of TransformerLens's get_act_patch_* functions: the activation, and what the result runs over.
_BY_POSITION, _BY_HEAD = ("layer", "pos"), ("layer", "head")
GRIDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    **{name: (name, _BY_POSITION) for name in ("resid_pre", "resid_mid", "attn_out", "mlp_out")},
    **{
        f"attn_head_{part}_by_pos": (hook, ("layer", "pos", "head"))
        for part, hook in (("out", "z"), ("q", "q"), ("k", "k"), ("v", "v"))
    },
    **{
        f"attn_head_{part}_all_pos": (hook, _BY_HEAD)
        for part, hook in (("out", "z"), ("q", "q"), ("k", "k"), ("v", "v"), ("pattern", "pattern"))
    },
    "attn_head_pattern_by_pos": ("pattern", ("layer", "head", "dest_pos")),
    "attn_head_pattern_dest_src_pos": ("pattern", ("layer", "head", "dest_pos", "src_pos")),
}
_FIELDS = {"pos": "position", "dest_pos": "position", "src_pos": "dims", "head": "head", "neuron": "dims"}


@dataclass(frozen=True, init=False)
class Site:
    """A place to patch: a hook point and a part of its activation.

    ``Site("resid_pre", 3, position=5)``, ``Site("hook_resid_pre", 3, ...)`` or ``Site("blocks.3.hook_resid_pre", ...)``.
    Selections are those of an Intervention: None for all, an int, a slice, a list or a mask.

    Args:
        hook: The hook point's name, short or full.
        layer: The block, where the name does not say.
        position: Which positions; at scores and patterns those of the queries.
        head: Which heads.
        dims: Which entries of the last axis: the keys at scores and patterns, neurons at mlp.hook_post.

    Raises:
        InputError: For a hook that is no name, and for a selection that is none.
    """

    hook: str
    position: Selection
    head: Selection
    dims: Selection

    def __init__(
        self,
        hook: str,
        layer: int | None = None,
        position: Selection = None,
        head: Selection = None,
        dims: Selection = None,
    ) -> None:
        if not isinstance(hook, str):
            raise InputError(f"a site's hook is a name, not {type(hook).__name__}.")
        layer = None if layer is None else checked_number(layer, "layer", least=0)
        # Made plain and checked as an intervention's selections are.
        inside = "." in hook or hook.startswith("hook_")  # "mlp.hook_post" of a layer
        name = in_block(layer, hook) if layer is not None and inside else get_act_name(hook, layer)
        patch = Patch(name, 0.0, heads=head, positions=position, dims=dims)
        for field, value in (("hook", patch.hook), ("position", patch.positions), ("head", patch.heads)):
            object.__setattr__(self, field, value)
        object.__setattr__(self, "dims", patch.dims)

    def patch(self, value: ArrayInput = 0.0) -> Patch:
        """The intervention that puts a value there.

        Args:
            value: A number, or an array shaped like the selected part of the activation.

        Returns:
            The Patch, which lets NaN and infinities in.
        """
        return Patch(self.hook, value, heads=self.head, positions=self.position, dims=self.dims, allow_nonfinite=True)

    @property
    def layer(self) -> int | None:
        """The number of the block it is in; None outside the blocks."""
        return split_name(self.hook)[0]

    def __str__(self) -> str:
        parts = (("pos", self.position), ("head", self.head), ("dims", self.dims))
        inside = ", ".join(f"{name} {value}" for name, value in parts if value is not None)
        return f"{self.hook}[{inside}]" if inside else self.hook


@dataclass(frozen=True)
class Sites:
    """Sites laid out along the axes of a result.

    Attributes:
        sites: The sites; along the last axis from one to the next.
        axes: The name of each axis.
        labels: What each entry of each axis is called.
    """

    sites: tuple[Site, ...]
    axes: tuple[str, ...]
    labels: Mapping[str, tuple[str, ...]]

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of labels of each axis."""
        return tuple(len(self.labels[axis]) for axis in self.axes)


def grid(
    hook: str, axes: Sequence[str], ranges: Mapping[str, Sequence[int]], labels: Mapping[str, Sequence[str]] = {}
) -> Sites:
    """All sites of a hook along some axes.

    Args:
        hook: A short name: "z", "resid_pre".
        axes: "layer", then any of "pos", "head", "neuron", "dest_pos" and "src_pos".
        ranges: The indices of each axis.
        labels: What to call them, where a number will not do.

    Returns:
        The sites, the last axis running fastest, with the axes' names and labels.

    Raises:
        InputError: For other axes.
    """
    if not axes or axes[0] != "layer" or any(axis not in _FIELDS for axis in axes[1:]):
        raise InputError(f"a grid's axes are 'layer' and then some of {', '.join(_FIELDS)}, not {list(axes)}.")
    found = []
    for layer, *rest in itertools.product(*(ranges[axis] for axis in axes)):
        selections = {_FIELDS[axis]: index for axis, index in zip(axes[1:], rest, strict=True)}
        found.append(Site(hook, layer, **selections))
    prefix = {"layer": "L", "head": "H"}
    if not isinstance(labels, Mapping):
        raise InputError(f"labels are a dict of axis -> names, not {type(labels).__name__}.")
    named = {a: tuple(labels.get(a, ())) or tuple(f"{prefix.get(a, '')}{i}" for i in ranges[a]) for a in axes}
    return Sites(tuple(found), tuple(axes), named)


def listed(sites: Iterable[Site] | Site | Sites) -> Sites:
    """One site, a list of sites or a grid as Sites; a list has one axis, "site". Raises InputError for an empty list, and
    for what is no site."""
    if isinstance(sites, Sites):
        found = sites
    else:
        several = isinstance(sites, Iterable) and not isinstance(sites, Site)
        every = tuple(cast("Iterable[Site]", sites)) if several else (cast(Site, sites),)
        for site in every:
            if not isinstance(site, Site):
                raise InputError(f"a sweep takes Site(hook, ...), not {type(site).__name__}.")
        found = Sites(every, ("site",), {"site": _distinct([str(site) for site in every])})
    if not found.sites:
        raise InputError("the list of sites is empty: there is nothing to patch.")
    return found


def _distinct(labels: list[str]) -> tuple[str, ...]:
    """The labels with a number behind each that has come before."""
    counts: dict[str, int] = {}
    found = []
    for label in labels:
        counts[label] = counts.get(label, 0) + 1
        found.append(label if counts[label] == 1 else f"{label} ({counts[label]})")
    return tuple(found)
