"""How the operand of an intervention lies over the selected part of an activation: which of its axes is which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np

from graphlens.edits.record import Array
from graphlens.edits.selection import Axis, Chosen, Indices, SelectionField, is_grid, order, selected_by
from graphlens.errors import InputError


class Edit(Protocol):
    """What is read here of an intervention: its name in errors, and its operand."""

    operand: ClassVar[str]

    @property
    def label(self) -> str:
        """How an error names it."""

    @property
    def array(self) -> Array:
        """Its operand."""

    def chosen(self, field: SelectionField | None) -> Chosen:
        """What a field selects, in its plain form; None, for all, where ``field`` is None."""


def aligned(item: Edit, names: Sequence[str]) -> Array:
    """The operand of an intervention with an axis for each of the activation's.

    An operand has the axes of the selected part, matched from the last one. A list, a slice or a mask of an axis keeps
    it, with as many entries as it selects; an integer takes it away. So at ``positions=-1`` of [batch, pos, d_model] an
    operand is [batch, d_model], [d_model] or a number, whatever the sizes are. A mask [batch, pos] keeps both axes whole.

    Args:
        item: The intervention.
        names: The names of the activation's axes.

    Returns:
        The operand with size 1 along axes that it does not have.

    Raises:
        InputError: For an operand with more axes than the selected part, unless it is the same for all that they go over.
    """
    array, rank, fields = item.array, len(names), selected_by(names)
    kept = [place for place, name in enumerate(names) if not isinstance(item.chosen(fields.get(name)), int)]
    if array.ndim <= len(kept):
        sizes = [1] * rank
        for place, size in zip(reversed(kept), reversed(array.shape), strict=False):
            sizes[place] = size
        return array.reshape(sizes)
    if array.ndim <= rank:
        # As of a mean that keeps its axes, [1, 1, d_model] at one position: it says the same either way.
        last = max(set(range(rank)) - set(kept)) - (rank - array.ndim)
        if array.shape[: last + 1] == (1,) * (last + 1):
            return array.reshape((1,) * (rank - array.ndim) + array.shape)
    raise misfit(item, names, f"it has {array.ndim} axes", [None] * rank)


def along(
    item: Edit, names: Sequence[str], value: Array, index: int, axes: Sequence[Axis], chosen: Indices | None
) -> Array:
    """An operand with its entries along one axis moved to where the run computes their elements.

    Args:
        item: The intervention, for errors.
        names: The names of the activation's axes, for errors.
        value: The operand, with as many axes as the activation (see ``aligned``).
        index: The place of the axis among them.
        axes: The axes in this run.
        chosen: What ``order`` gave for the axis.

    Returns:
        The operand with 1 or ``axis.size`` entries along the axis. Those of elements that are not selected mean nothing.

    Raises:
        InputError: If the operand has not as many entries as are selected.
    """
    size, axis = value.shape[index], axes[index]
    if size == 1:
        return value
    ensure_fits(item, names, size, axis, chosen, [each.total for each in axes])
    if chosen is None:
        return value[(slice(None),) * index + (slice(axis.start, axis.start + axis.size),)]
    places = np.zeros(axis.size, np.int64)
    local = chosen - axis.start
    here = (local >= 0) & (local < axis.size)
    places[local[here]] = np.flatnonzero(here)
    return value.take(places, axis=index)


def ensure_fits(
    item: Edit, names: Sequence[str], size: int, axis: Axis, chosen: Indices | None, totals: Sequence[int | None]
) -> None:
    """Checks that an operand has as many entries along an axis as are selected, or one for all.

    Args:
        item: The intervention.
        names: The names of the activation's axes.
        size: The operand's size along the axis.
        axis: The axis.
        chosen: What ``order`` gave for it.
        totals: The activation's sizes; None for those that are not known yet.

    Raises:
        InputError: If it has not.
    """
    if size in (1, axis.total if chosen is None else len(chosen)):
        return
    selection = "" if chosen is None else f", of which {len(chosen)} are selected"
    has = f"along {axis.name} it has {size}, and the activation {axis.total}{selection}"
    raise misfit(item, names, has, totals)


def misfit(item: Edit, names: Sequence[str], why: str, totals: Sequence[int | None]) -> InputError:
    """The error for an operand that does not fit the selected part of an activation.

    Args:
        item: The intervention.
        names: The names of the activation's axes.
        why: What is wrong with the operand.
        totals: The activation's sizes; None for those that are not known.

    Returns:
        An error that shows the axes which an operand has, and, where this one is shaped like the whole activation, how
        the selected part of it is taken.
    """
    fields, shape = selected_by(names), item.array.shape
    selections = [item.chosen(fields.get(name)) for name in names]
    whole = f"[{', '.join(names)}]"
    if all(selection is None for selection in selections):
        fits = f"the activation {whole}"
    else:
        kept = [name for name, selection in zip(names, selections, strict=True) if not isinstance(selection, int)]
        asked = ", ".join(
            f"{fields[name]}={selection!r}"
            for name, selection in zip(names, selections, strict=True)
            if selection is not None
        )
        fits = f"the activation {whole} at {asked}, whose selected part is [{', '.join(kept)}]"
    said = f"{item.label}: its {item.operand} has shape {list(shape)}, which does not fit {fits}: {why}."
    if len(shape) > len(names):
        return InputError(f"{said} These are more axes than the activation's {len(names)}.")
    ours = selections[len(names) - len(shape) :]
    like_whole = all(
        size == 1 or total in (None, size) for size, total in zip(shape, totals[len(names) - len(shape) :], strict=True)
    )
    known = not any(isinstance(selection, str) or is_grid(selection) for selection in selections)
    index = _index_text(ours, shape)
    if like_whole and known and index:
        return InputError(
            f"{said} Read as the whole activation, [{', '.join(names[len(names) - len(shape) :])}], it would fit, but an "
            f"operand is of the selected part: index it first, {item.operand}{index}."
        )
    return InputError(said)


def _index_text(selections: Sequence[Chosen], shape: Sequence[int]) -> str:
    """What one writes behind a whole activation to take the selected part: an index for each axis, the last one first,
    since NumPy pairs the lists of one index."""
    found = ""
    for place in reversed(range(len(shape))):
        selection = selections[place]
        if selection is None or (shape[place] == 1 and not isinstance(selection, int)):
            continue
        if isinstance(selection, slice):
            start, stop, step = (
                "" if part is None else part for part in (selection.start, selection.stop, selection.step)
            )
            text = f"{start}:{stop}:{step}" if step else f"{start}:{stop}"
        elif isinstance(selection, int):
            text = str(selection if shape[place] > 1 else 0)
        else:
            text = str(list(selection))
        found += f"[{', '.join([*[':'] * place, text])}]"
    return found


def part_of(item: Edit, activation: Array, names: Sequence[str]) -> Array:
    """The part of a whole activation that an intervention selects, as its operand has it.

    Args:
        item: The intervention.
        activation: That of whole prompts, [batch, pos, ...].
        names: Their names.

    Returns:
        What ``activation`` holds at the selected elements: without the axes along which an integer is selected, and
        whole along those of a mask [batch, pos].

    Raises:
        InputError: For an index that the activation does not have.
    """
    fields = selected_by(names)
    removed = []
    for place, name in enumerate(names):
        field = fields.get(name)
        selection, axis = item.chosen(field), Axis.fixed(name, activation.shape[place])
        chosen = None if is_grid(selection) else order(selection, axis, item.label, field, axis.total)
        if chosen is not None:
            activation = activation.take(chosen, axis=place)
        if isinstance(selection, int):
            removed.append(place)
    return activation.squeeze(tuple(removed))
