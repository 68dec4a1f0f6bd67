"""Interventions as part of a graph: a file that is edited, whatever runs it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from graphlens.edits import gate
from graphlens.edits.files import to_json
from graphlens.edits.kinds import Intervention, checked, hooks_of
from graphlens.edits.operand import aligned, along
from graphlens.edits.parts import PARTS
from graphlens.edits.record import Array
from graphlens.edits.selection import (
    POSITION_AXES,
    Axis,
    Grid,
    Mask,
    SelectionField,
    is_grid,
    order,
    selected_by,
)
from graphlens.errors import InputError
from graphlens.file.io_names import ATTENTION_MASK
from graphlens.file.manifest import METADATA_KEY, HookEntry
from graphlens.file.names import JOINT_AXES, axis_sizes, select
from graphlens.file.sae_names import is_of_sae
from graphlens.file.written import EDITS_KEY
from graphlens.surgery.adopted.past import without_past
from graphlens.surgery.fold import Folded, fold
from graphlens.surgery.gates import keep_masked
from graphlens.surgery.graph import ensure_hooks_resolve, read_manifest
from graphlens.surgery.outputs import keep_results
from graphlens.surgery.segments import with_past as add_past
from graphlens.surgery.splice import Edit, Scope, splice

Listed = int | slice | tuple[int, ...] | tuple[bool, ...]  # a selection that is neither text nor a mask [batch, pos]
_UNSEEN = 2**40  # a length that no sequence reaches


def bake(
    model: ir.Model,
    interventions: Sequence[Intervention],
    *,
    with_past: bool = False,
    keep_hooks: bool = False,
) -> tuple[ir.Model, Folded]:
    """A copy of a hooked model with interventions inside.

    An edit that is the same at every position goes into the weights where it can, and then costs nothing when the model
    runs; elsewhere it becomes nodes. Positions beyond the sequence of a run are ignored.

    Args:
        model: A hooked model, with those flagged hook points that the interventions name (see with_flagged).
        interventions: In the order in which they apply.
        with_past: True adds the inputs and outputs of a KV cache.
        keep_hooks: True keeps the manifest and the hook points as outputs; no edit goes into the weights then. Otherwise
            the graph returns ``logits`` (and ``present.*``), has no manifest, and needs none.

    Returns:
        (the copy, the new content of the weights that edits went into, by weights file and tensor).

    Raises:
        UnknownHookPoint: For a hook point that the model does not have.
        InputError: For an intervention that does not fit its hook point, or that a file cannot hold.
    """
    manifest = read_manifest(model)
    names, config = list(manifest.hooks), manifest.config
    sizes = axis_sizes(config)
    items = []
    for item in checked(interventions):
        (name,) = select(names, item.hook, config.n_layers)
        items.append(item.at(name))
    by_hook = {hook: [item for item in items if item.hook == hook] for hook in hooks_of(items)}
    for hook, some in by_hook.items():
        gate.check(some, gate.firings(hook, manifest.hooks).values(), sizes)
    folded: Folded = {}
    # Where an SAE stands, what is added before it is not what is added behind it.
    if not keep_hooks and not any(map(is_of_sae, names)):
        by_hook, folded = fold(model, manifest, by_hook)
    model = add_past(model) if with_past else without_past(model)
    edits = {
        name: _edit(by_hook[hook], manifest.hooks[name], manifest.hooks[name].sizes(sizes), with_past)
        for name in names
        for hook in [name.partition("@")[0]]
        if hook in by_hook
    }
    model = splice(model, edits)  # splice copies, also where there is nothing to edit
    if not keep_hooks:
        model = keep_results(model)
        del model.metadata_props[METADATA_KEY]
        common_passes.RemoveUnusedNodesPass()(model)
    else:
        ensure_hooks_resolve(model, "the baked graph")
    if items:
        model.metadata_props[EDITS_KEY] = _described(items)
    return model, folded


def _described(items: Sequence[Intervention]) -> str:
    """The interventions as compact JSON; of arrays only their names, dtypes and shapes."""
    text, tensors = to_json(items)
    data = json.loads(text)
    data["tensors"] = {name: f"{array.dtype}{list(array.shape)}" for name, array in tensors.items()}
    return json.dumps(data, separators=(",", ":"))


def _edit(items: Sequence[Intervention], entry: HookEntry, sizes: Mapping[str, int], past: bool) -> Edit:
    """The edit that writes the interventions at one hook point as nodes."""

    def edit(value: ir.Value, scope: Scope) -> ir.Value:
        result = value
        for item in items:
            result = _Baked(item, entry, sizes, past, scope, value).apply(result)
        return result if result is value else keep_masked(value, result, scope)

    return edit


class _Baked:
    """One intervention being written as nodes. ``like`` is the unedited activation, whose shape tells the sizes."""

    def __init__(
        self, item: Intervention, entry: HookEntry, sizes: Mapping[str, int], past: bool, scope: Scope, like: ir.Value
    ) -> None:
        self.item, self.axes, self.sizes, self.past, self.scope, self.like = item, entry.axes, sizes, past, scope, like
        self.rank = len(entry.axes)
        self.field_of = selected_by(entry.axes)

    def apply(self, x: ir.Value) -> ir.Value:
        """The activation after the intervention."""
        item = self.item
        array = aligned(item, self.axes)
        fixed: Mask | None = None  # the selection along axes whose size is known
        dynamic: list[ir.Value] = []
        gathers: list[tuple[int, ir.Value]] = []
        for index, name in enumerate(self.axes):
            if name not in self.sizes:
                mask, gather, array = self._along_run(name, index, array)
                dynamic += [] if mask is None else [mask]
                gathers += [] if gather is None else [(index, gather)]
                continue
            field, axis = self.field_of.get(name), Axis.fixed(name, self.sizes[name])
            chosen = order(item.chosen(field), axis, item.label, field)
            axes = [Axis.fixed(other, self.sizes.get(other, 1)) for other in self.axes]
            array = along(item, self.axes, array, index, axes, chosen)
            if chosen is not None:
                flags = axis.mask(chosen, index, self.rank)
                fixed = flags if fixed is None else fixed & flags
        assert self.like.dtype is not None
        array = array.astype(self.like.dtype.numpy())
        op, constant, part = self.scope.op, self.scope.constant, PARTS[item.part]
        if part.masked:
            mask = self._all(
                [constant(np.ones((1,) * self.rank, bool) if fixed is None else fixed, "chosen"), *dynamic]
            )
            return op(part.operator, part.arguments(x, [mask, self._gathered(constant(array, "value"), gathers)]))
        operand = self._gathered(constant(part.filled(array, fixed), "value"), gathers)
        changed = op(part.operator, part.arguments(x, [operand]))
        return changed if not dynamic else op("Where", [self._all(dynamic), changed, x])

    def _all(self, masks: Sequence[ir.Value]) -> ir.Value:
        """True where all masks are."""
        result = masks[0]
        for mask in masks[1:]:
            result = self.scope.op("And", [result, mask])
        return result

    def _gathered(self, value: ir.Value, gathers: Sequence[tuple[int, ir.Value]]) -> ir.Value:
        """The operand with its entries where the run has their elements: (axis, places) by (axis, places)."""
        for index, places in gathers:
            value = self.scope.op("Gather", [value, places], axis=index)
        return value

    # Along an axis whose size only a run knows

    def _integers(self, numbers: npt.ArrayLike, name: str) -> ir.Value:
        """A constant of int64."""
        return self.scope.constant(np.asarray(numbers, np.int64), name)

    def _indices(self, name: str, index: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        """(indices int64 [n] from the start of the sequence, total int64 [], first index int64 []) along an axis."""
        op = self.scope.op
        size = op("Squeeze", [op("Shape", [self.like], start=index, end=index + 1)])
        zero, one = self._integers(0, "zero"), self._integers(1, "one")
        if self.past and name in POSITION_AXES:
            inputs = {str(value.name): value for value in self.scope.graph.inputs}
            if ATTENTION_MASK in inputs and ATTENTION_MASK not in self.scope.graph.initializers:
                total = op("Squeeze", [op("Shape", [inputs[ATTENTION_MASK]], start=1, end=2)])
                start = op("Sub", [total, size])
            else:  # an adopted graph, whose mask may be left out
                past = next(value for name, value in inputs.items() if name.startswith("past_key_values."))
                start = op("Squeeze", [op("Shape", [past], start=2, end=3)])
                total = op("Add", [start, size])
            return op("Range", [start, total, one]), total, start
        return op("Range", [zero, size, one]), size, zero

    def _column(self, value: ir.Value, index: int) -> ir.Value:
        """[n] as an axis of the activation."""
        shape = [1] * self.rank
        shape[index] = -1
        return self.scope.op("Reshape", [value, self._integers(shape, "column")])

    def _along_run(self, name: str, index: int, array: Array) -> tuple[ir.Value | None, ir.Value | None, Array]:
        """(mask or None, places to gather the operand at or None, the operand) along an axis."""
        field, size = self.field_of.get(name), array.shape[index]
        selection = self.item.chosen(field)
        if name in JOINT_AXES and size > 1:
            raise InputError(
                f"{self.item.label}: a file can't tell which {size} entries along {name} a value for each of them is for, since "
                "that depends on the batch and the length: give one for all."
            )
        if selection is None and size == 1:
            return None, None, array
        op = self.scope.op
        indices, total, start = self._indices(name, index)
        if is_grid(selection):
            return self._within(self._grid(selection, indices, index), indices, index, array)
        if isinstance(selection, str):
            if not self.past:
                raise InputError(
                    f"{self.item.label}: positions={selection!r} needs a file with past keys and values (with_past): "
                    "without them a run can't tell the prompt from what was generated."
                )
            if selection == "generated" and size > 1:
                raise InputError(
                    f"{self.item.label}: a file can't tell which {size} positions a value per position is for where "
                    "positions='generated' depends on the length of the prompt: list them."
                )
            prompt = op("Equal", [start, self._integers(0, "zero")])
            flag = prompt if selection == "prompt" else op("Not", [prompt])
            mask = op("Reshape", [flag, self._integers([1] * self.rank, "scalar")])
            return self._within(mask, indices, index, array)
        if selection is None or selection == slice(None):
            return self._whole(indices, index, array)
        ahead, behind = _split(selection, self.item.label, field)
        parts = []
        if isinstance(selection, slice):
            parts.append(self._slice(selection, indices, total))
        else:
            if ahead:
                parts.append(self._member(indices, ahead))
            if behind:
                parts.append(self._member(op("Sub", [indices, total]), behind))
        mask = parts[0] if len(parts) == 1 else op("Or", parts)
        column = self._column(mask, index)
        chosen = _listed(selection)
        if size == 1:
            return column, None, array
        if chosen is None:
            raise InputError(
                f"{self.item.label}: a file can't tell which {size} positions a value per position is for where "
                f"{field}={selection!r} depends on the length: list them, or give the slice an end."
            )
        if size != len(chosen):
            raise InputError(
                f"{self.item.label}: along {name} its {self.item.operand} has {size} entries, and {len(chosen)} are selected."
            )
        if ahead and behind:
            raise InputError(f"{self.item.label}: a value per position needs them all counted from the same end.")
        # As many as are selected: entry i belongs to the i-th listed position.
        table = np.zeros(max(abs(i) for i in chosen) + 1, np.int64)
        for place, position in enumerate(chosen):
            table[position if ahead else -position] = place
        counted = indices if ahead else op("Sub", [total, indices])
        inside = op("Min", [counted, self._integers(len(table) - 1, "last")])
        return column, op("Gather", [self._integers(table, "places"), inside]), array

    def _whole(self, indices: ir.Value, index: int, array: Array) -> tuple[ir.Value | None, ir.Value | None, Array]:
        """An operand with an entry for each index from the start; what lies beyond them stays as it is."""
        size = array.shape[index]
        if size == 1:
            return None, None, array
        inside = self.scope.op("Less", [indices, self._integers(size, "size")])
        places = self.scope.op("Min", [indices, self._integers(size - 1, "last")])
        return self._column(inside, index), places, array

    def _within(
        self, mask: ir.Value, indices: ir.Value, index: int, array: Array
    ) -> tuple[ir.Value, ir.Value | None, Array]:
        """``_whole`` of the positions in a mask alone."""
        inside, places, array = self._whole(indices, index, array)
        return self._all([mask, *([] if inside is None else [inside])]), places, array

    def _member(self, indices: ir.Value, wanted: Sequence[int]) -> ir.Value:
        """bool [n]: which indices are wanted."""
        op = self.scope.op
        if len(wanted) == 1:
            return op("Equal", [indices, self._integers(wanted[0], "position")])
        equal = op(
            "Equal", [op("Unsqueeze", [indices, self._integers([1], "axis")]), self._integers(wanted, "positions")]
        )
        count = op(
            "ReduceMax", [op("Cast", [equal], to=int(ir.DataType.INT32)), self._integers([1], "axis")], keepdims=0
        )
        return op("Cast", [count], to=int(ir.DataType.BOOL))

    def _slice(self, chosen: slice, indices: ir.Value, total: ir.Value) -> ir.Value:
        """bool [n]: which indices a slice of the sequence holds, by Python's rules."""
        op = self.scope.op
        step = 1 if chosen.step is None else chosen.step
        zero = self._integers(0, "zero")

        def bound(number: int) -> ir.Value:
            given = self._integers(number, "bound")
            return given if number >= 0 else op("Max", [op("Add", [total, given]), zero])

        if step > 0:
            first = zero if chosen.start is None else bound(chosen.start)
            conditions = [op("GreaterOrEqual", [indices, first])]
            if chosen.stop is not None:
                conditions.append(op("Less", [indices, bound(chosen.stop)]))
            away = op("Sub", [indices, first])
        else:
            last = op("Sub", [total, self._integers(1, "one")])
            first = last if chosen.start is None else op("Min", [bound(chosen.start), last])
            conditions = [op("LessOrEqual", [indices, first])]
            if chosen.stop is not None:
                conditions.append(op("Greater", [indices, bound(chosen.stop)]))
            away = op("Sub", [first, indices])
        if abs(step) > 1:
            conditions.append(op("Equal", [op("Mod", [away, self._integers(abs(step), "step")]), zero]))
        return self._all(conditions)

    def _grid(self, selection: Grid, indices: ir.Value, index: int) -> ir.Value:
        """A mask [batch, pos] at the positions of the run; False beyond it."""
        op = self.scope.op
        grid = np.asarray(selection, bool)
        longer = np.concatenate([grid, np.zeros((len(grid), 1), bool)], 1)
        inside = op("Min", [indices, self._integers(grid.shape[1], "last")])
        taken = op("Gather", [self.scope.constant(longer, "grid"), inside], axis=1)
        shape = [1] * self.rank
        shape[0], shape[index] = len(grid), -1
        return op("Reshape", [taken, self._integers(shape, "column")])


def _listed(selection: Listed) -> list[int] | None:
    """The positions a selection lists, in its order; None where their number depends on the run."""
    if isinstance(selection, slice):
        if selection.stop is None or selection.stop < 0 or (selection.start or 0) < 0 or (selection.step or 1) < 0:
            return None
        return list(range(*selection.indices(_UNSEEN)))
    if isinstance(selection, tuple) and isinstance(selection[0], bool):
        return [int(i) for i in np.flatnonzero(selection)]
    return [selection] if isinstance(selection, int) else [int(i) for i in selection]


def _split(selection: Listed, label: str, field: SelectionField | None) -> tuple[list[int], list[int]]:
    """A list's positions counted from the start, and those counted from the end."""
    if isinstance(selection, slice):
        return [0], []
    listed = _listed(selection) or []
    if not listed:
        raise InputError(f"{label}: {field}={selection!r} selects nothing.")
    return [i for i in listed if i >= 0], [i for i in listed if i < 0]
