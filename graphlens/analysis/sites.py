"""The places that a sweep patches: one by one, or a grid of them over layers, positions and heads."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphlens.edits.kinds import Patch, Selection
from graphlens.errors import InputError
from graphlens.file.names import get_act_name, split_name

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
    ``position``, ``head`` and ``dims`` select as an Intervention's positions, heads and dims do: None for all, an int, a
    slice, a list or a mask. At scores and patterns ``position`` is the query's and ``dims`` the key's; at mlp.hook_post
    ``dims`` are neurons.
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
        # Made plain and checked as an intervention's selections are.
        inside = layer is not None and ("." in hook or hook.startswith("hook_"))  # "mlp.hook_post" of a layer
        name = f"blocks.{layer}.{hook}" if inside else get_act_name(hook, layer)
        patch = Patch(name, 0.0, heads=head, positions=position, dims=dims)
        for field, value in (("hook", patch.hook), ("position", patch.positions), ("head", patch.heads)):
            object.__setattr__(self, field, value)
        object.__setattr__(self, "dims", patch.dims)

    def patch(self, value: Any = 0.0) -> Patch:
        """The intervention that puts ``value`` (an activation, or the selected part of it) there."""
        return Patch(self.hook, value, heads=self.head, positions=self.position, dims=self.dims, allow_nonfinite=True)

    @property
    def layer(self) -> int | None:
        """The block it is in, None outside the blocks."""
        return split_name(self.hook)[0]

    def __str__(self) -> str:
        parts = (("pos", self.position), ("head", self.head), ("dims", self.dims))
        inside = ", ".join(f"{name} {value}" for name, value in parts if value is not None)
        return f"{self.hook}[{inside}]" if inside else self.hook


@dataclass(frozen=True)
class Sites:
    """Sites in the order of a result's axes, the last axis fastest, with the labels of each axis."""

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
    """All sites of a hook over ``axes``, each of "layer", "pos", "head", "neuron", "dest_pos" and "src_pos".

    ``hook`` is a short name ("z", "resid_pre"); ``ranges`` holds the indices of each axis, ``labels`` what to call them
    where a number will not do.
    """
    if not axes or axes[0] != "layer" or any(axis not in _FIELDS for axis in axes[1:]):
        raise InputError(f"a grid's axes are 'layer' and then some of {', '.join(_FIELDS)}, not {list(axes)}.")
    found = []
    for layer, *rest in itertools.product(*(ranges[axis] for axis in axes)):
        selections = {_FIELDS[axis]: index for axis, index in zip(axes[1:], rest, strict=True)}
        found.append(Site(hook, layer, **selections))
    prefix = {"layer": "L", "head": "H"}
    named = {a: tuple(labels.get(a, ())) or tuple(f"{prefix.get(a, '')}{i}" for i in ranges[a]) for a in axes}
    return Sites(tuple(found), tuple(axes), named)


def listed(sites: Iterable[Site] | Site | Sites) -> Sites:
    """Any sites as Sites: a list has one axis, "site". Raises InputError for none, and for what is no site."""
    if isinstance(sites, Sites):
        found = sites
    else:
        every = (sites,) if isinstance(sites, Site) else tuple(sites)
        for site in every:
            if not isinstance(site, Site):
                raise InputError(f"a sweep takes Site(hook, ...), not {type(site).__name__}.")
        found = Sites(every, ("site",), {"site": _distinct([str(site) for site in every])})
    if not found.sites:
        raise InputError("the list of sites is empty: there is nothing to patch.")
    return found


def _distinct(labels: list[str]) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    found = []
    for label in labels:
        counts[label] = counts.get(label, 0) + 1
        found.append(label if counts[label] == 1 else f"{label} ({counts[label]})")
    return tuple(found)
