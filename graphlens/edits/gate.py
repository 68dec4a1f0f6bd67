"""What the interventions at one hook point come to in one run: a factor, an addend, and a replacement for some elements.

Every sequence of them is one map x -> where(where, patch, x * scale + add), since each kind is one and such maps compose.
So one gate serves every sequence, and only its inputs change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from graphlens.edits.kinds import KINDS, Intervention, names_of
from graphlens.edits.operand import aligned, along, ensure_fits
from graphlens.edits.parts import INPUTS, PARTS, Change
from graphlens.edits.record import Array
from graphlens.edits.selection import (
    FIELDS,
    POSITION_AXES,
    Axis,
    Mask,
    Window,
    grid_mask,
    is_grid,
    order,
    selected_by,
)
from graphlens.errors import InputError, warn
from graphlens.file.manifest import HookEntry
from graphlens.file.names import JOINT_AXES

__all__ = ["Window", "check", "compose", "firings", "kinds", "neutral", "selected_by"]


def kinds(items: Sequence[Intervention]) -> tuple[str, ...]:
    """The parts of the gate that the interventions at one hook point need.

    Args:
        items: The interventions.

    Returns:
        The names of the parts, each once, in the order of ``PARTS``.
    """
    needed = {item.part for item in items}
    return tuple(part for part in PARTS if part in needed)


def neutral(name: str, dtype: str) -> Array:
    """The scalar at which an input of a gate changes nothing.

    Args:
        name: "scale", "add", "where" or "patch".
        dtype: The activation's dtype.

    Returns:
        An array [] of that dtype; of bools for "where".
    """
    number = next(number for other, number in INPUTS[name].inputs.items() if other == name)
    return np.asarray(number, bool if isinstance(number, bool) else dtype)


def firings(hook: str, entries: Mapping[str, HookEntry]) -> dict[str, HookEntry]:
    """The firings of a hook point in a graph: with split inputs the norm before attention has one each for q, k and v.

    Args:
        hook: The hook point's name.
        entries: The graph's hook map.

    Returns:
        The name of each firing and its entry. They have the same axes, except that those of grouped keys and values have
        fewer heads.
    """
    names = [hook, *(name for name in entries if name.startswith(f"{hook}@"))]
    return {name: entries[name] for name in names}


def check(items: Sequence[Intervention], entries: Iterable[HookEntry], sizes: Mapping[str, int]) -> None:
    """Checks what can be checked of the interventions at one hook point before there is a run.

    Warns where a patch hides an earlier one of the same elements.

    Args:
        items: The interventions, in the order in which they apply.
        entries: The hook point's firings.
        sizes: The sizes of those axes that are the same in every run.

    Raises:
        InputError: For a selection along an axis that is not there, an index beyond it, or an operand that fits no run.
    """
    for entry in entries:
        for item in items:
            if entry.dtype.startswith("int"):
                _check_integers(item, entry, sizes)
            _check_fields(item, entry.axes)
            _check_along(item, entry.axes, entry.sizes(sizes))
    patches = [item.selection for item in items if item.is_activation]
    if len(patches) > len(set(patches)):
        warn(f"two patches of the same elements at {items[0].hook!r}: the later one wins.")


def _check_fields(item: Intervention, axes: Sequence[str]) -> None:
    """Raises InputError for a selection along an axis that the activation does not have: it would be ignored."""
    able, its = selected_by(axes).values(), f"its axes are {', '.join(axes)}"
    if axes[0] in JOINT_AXES:
        its += ", the first several in one as in TransformerLens: use a Python hook, or attn.hook_q, hook_rot_q and their likes"
    for field in FIELDS:
        if item.chosen(field) is not None and field not in able:
            raise InputError(f"{item.label}: it has no {field} ({its}); leave out {field}=.")


def _check_integers(item: Intervention, entry: HookEntry, sizes: Mapping[str, int]) -> None:
    """Raises InputError unless the intervention puts ids of tokens, or of experts, in place of such."""
    if not item.is_activation:
        able = names_of(kind for kind in KINDS.values() if kind.is_activation)
        raise InputError(f"{item.label}: this hook point holds integers, which only {able} can change.")
    what, count = ("experts'", sizes["expert"]) if "chosen_expert" in entry.axes else ("token", sizes["vocabulary"])
    values = item.array
    if values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= count:
        raise InputError(f"{item.label}: its value must be {what} ids, integers from 0 to {count - 1}.")


def _check_along(item: Intervention, names: Sequence[str], sizes: Mapping[str, int]) -> None:
    """Raises InputError unless selection and operand fit along the axes whose size is the same in every run."""
    fields, shape = selected_by(names), aligned(item, names).shape
    for name, size in zip(names, shape, strict=True):
        if name not in sizes or name == "1" or name not in fields:
            continue
        axis = Axis.fixed(name, sizes[name])
        chosen = order(item.chosen(fields[name]), axis, item.label, fields[name])
        ensure_fits(item, names, size, axis, chosen, [sizes.get(other) for other in names])


def compose(
    items: Sequence[Intervention], entry: HookEntry, sizes: Mapping[str, int], window: Window
) -> dict[str, Array]:
    """What the interventions at one hook point come to in one run.

    Args:
        items: The interventions, in the order in which they apply.
        entry: The hook point.
        sizes: The sizes of those axes that are the same in every run.
        window: The tokens of the run.

    Returns:
        The arrays of a gate by the names of its inputs, each broadcasting to the activation, without those of parts
        that change nothing.

    Raises:
        InputError: For positions or batch entries that are not there, and operands that do not fit.
    """
    axes = [_axis(name, entry.sizes(sizes), window) for name in entry.axes]
    change = Change()
    for item in items:
        found = _placed(item, entry, axes, window)
        if found is not None:
            mask, operand = found
            part = PARTS[item.part]
            change = part.then(change, mask, part.filled(operand, mask))
    return change.arrays()


def _axis(name: str, sizes: Mapping[str, int], window: Window) -> Axis:
    """An axis of an activation in a run."""
    if name == "batch":
        return Axis.fixed(name, window.batch)
    if name in POSITION_AXES:
        return Axis(name, window.start, window.new, window.total, window.horizon)
    if name == "key_pos":
        return Axis(name, 0, window.total, window.total, window.horizon)
    if name in JOINT_AXES:
        return Axis.fixed(name, window.batch * window.new * math.prod(sizes[axis] for axis in JOINT_AXES[name]))
    return Axis.fixed(name, sizes[name])


def _placed(
    item: Intervention, entry: HookEntry, axes: Sequence[Axis], window: Window
) -> tuple[Mask | None, Array] | None:
    """(the selected elements or None for all, the operand), both broadcasting to the activation of this run; None where
    the run has none of the elements."""
    rank = len(axes)
    mask: Mask | None = None
    value = aligned(item, entry.axes)
    field_of, label = selected_by(entry.axes), item.label
    for index, axis in enumerate(axes):
        field = field_of.get(axis.name)
        selection = item.chosen(field)
        chosen = part = None
        if is_grid(selection):
            grid = grid_mask(selection, axis, window, label)
            part = grid.reshape(len(grid), *(1,) * (index - 1), axis.size, *(1,) * (rank - index - 1))
        else:
            chosen = order(selection, axis, label, field, window.prompt, item.strict)
            part = None if chosen is None else axis.mask(chosen, index, rank)
        if part is not None:
            if not part.any():
                return None
            mask = part if mask is None else mask & part
        value = along(item, entry.axes, value, index, axes, chosen)
    with np.errstate(over="ignore"):  # the error below says it
        cast = value.astype(entry.dtype, copy=False)
    if not item.allow_nonfinite and not np.isfinite(cast).all():
        raise InputError(f"{label}: its {item.operand} is too large for {entry.dtype}.")
    return mask, cast
