"""Hook points behind flags: rewrites that make a head's own input, or its own result, a value of the graph.

They are built from the manifest (weights by TransformerLens name, hook values), not from the shape of the traced
nodes, and what they replace is removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.tape import Tape

from graphlens.errors import InputError
from graphlens.file.firing import graph_order
from graphlens.file.io_names import INPUT_IDS
from graphlens.file.manifest import HookEntry, Manifest, WeightView
from graphlens.file.names import BLOCK, FLAGGED, HEAD_RESIDUAL, axes_of, in_block
from graphlens.file.stored import StoredWeights
from graphlens.surgery.graph import (
    finish,
    install,
    integers,
    let_read,
    numbered,
    read_manifest,
    replace_value,
    values_by_name,
)
from graphlens.surgery.structure import Structure
from graphlens.surgery.sublayers import norm_weights, sublayers

FLAGS = tuple(dict.fromkeys(FLAGGED.values()))


def with_flagged(model: ir.Model, flags: Iterable[str]) -> ir.Model:
    """A copy in which the hook points of flags are there, named and shaped as in TransformerLens.

    While ``use_attn_in`` or ``use_split_qkv_input`` is set, the hook points of ln1 have a head axis.

    Args:
        model: A hooked model.
        flags: Some of ``use_attn_result``, ``use_split_qkv_input``, ``use_attn_in``, ``use_hook_mlp_in`` and
            ``use_hook_tokens``.

    Returns:
        The copy; the model itself where no flag is given.

    Raises:
        InputError: There is no such flag; ``use_attn_in`` and ``use_split_qkv_input`` are given together;
            ``use_attn_in`` is given for a model with fewer key-value heads than heads; or the model computes what a
            flag rewrites in another way than the flag would (a norm or a bias that the manifest does not name).
    """
    wanted = set(flags)
    if wanted - set(FLAGS):
        raise InputError(f"unknown flag {sorted(wanted - set(FLAGS))[0]!r}: the flags are {', '.join(FLAGS)}.")
    if {"use_attn_in", "use_split_qkv_input"} <= wanted:
        raise InputError("use_attn_in and use_split_qkv_input exclude each other: switch one off first.")
    if not wanted:
        return model
    work = _Rewrite(model.clone())
    if "use_hook_tokens" in wanted:
        config = work.manifest.config
        embedded = "embed.hook_embed" if config.is_encoder and not config.pre_norm_encoder else "hook_embed"
        work.fork(INPUT_IDS, [embedded], "hook_tokens", "int64")
    for layer in range(work.manifest.config.n_layers):
        if not any(in_block(layer, f"attn.hook_{letter}") in work.values for letter in "qkvz"):  # not in this segment
            continue
        if wanted & {"use_attn_in", "use_split_qkv_input"}:
            work.split_inputs(layer, split="use_split_qkv_input" in wanted)
        if "use_attn_result" in wanted:
            work.results(layer)
        if "use_hook_mlp_in" in wanted:
            work.mlp_input(layer)
    return work.finish()


class _Rewrite:
    """One model being rewritten in place, with its hook map."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.graph = model, model.graph
        self.manifest: Manifest = read_manifest(model)
        self.hooks = dict(self.manifest.hooks)
        self.values = values_by_name(model)
        self._weights = StoredWeights(model, self.manifest)
        self._structure = Structure(model, self.manifest)
        self._added: list[ir.Value] = []
        self._made: dict[str, ir.Value] = {}  # weights that the tape at work holds already

    def finish(self) -> ir.Model:
        """The model with its new outputs and hook map, without what was replaced."""
        known = set(self.graph.outputs)
        self.graph.outputs.extend(value for value in self._added if value not in known)
        common_passes.RemoveUnusedNodesPass()(self.model)
        self.graph.sort()
        values = values_by_name(self.model)
        carried = {name: values[entry.value] for name, entry in self.hooks.items()}
        order = graph_order(self.graph, carried, self.manifest.config.n_layers)
        manifest = self.manifest.with_hooks({name: self.hooks[name] for name in order})
        return finish(self.model, manifest, "the graph with flagged hook points")

    def fork(self, source: str, readers: Sequence[str], name: str, dtype: str) -> None:
        """Adds a hook point: a copy of the value ``source``, which the hook points ``readers`` are computed from."""
        value = self.values[source]
        upstream = set[ir.Node]().union(*(_ancestors(self.values[self.hooks[hook].value], value) for hook in readers))
        found = [(node, index) for node, index in value.uses() if node in upstream]
        if not found:
            raise InputError(
                f"{name!r} would change nothing in this model: {readers[0]!r} is not computed from {source!r}."
            )
        tape = Tape()
        copy = tape.op("Identity", [value])
        let_read(found, copy, value)
        self._declare(name, copy, axes_of(name), dtype)
        self._install(tape, f"{name}/")

    def mlp_input(self, layer: int) -> None:
        """Adds the hook point of the residual that the MLP reads."""
        parts = sublayers(self.manifest.config, layer)[1:]
        if not parts:
            raise InputError("use_hook_mlp_in cannot be set for this model: its blocks have no MLP.")
        (mlp,) = parts
        readers = list(mlp.readers) if mlp.norm is None else [mlp.start]
        lost = [name for name in (mlp.residual, *readers) if name not in self.hooks]
        self._ensure(not lost, "use_hook_mlp_in", mlp.residual, readers[0])
        self.fork(self.hooks[mlp.residual].value, readers, in_block(layer, "hook_mlp_in"), self.manifest.config.dtype)

    def _ensure(self, is_so: bool, flag: str, start: str, end: str) -> None:
        """Refuses a flag whose rewrite of what lies between two hook points would compute something else."""
        if not is_so:
            raise InputError(
                f"{flag} cannot be set for this model: between {start!r} and {end!r} it computes something else than a norm "
                "and the weights that TransformerLens names (a norm of its own there, an edit that was baked in, or a weight "
                "or bias without a name), and this flag would leave that out."
            )

    def _ensure_found(self, flag: str, names: Iterable[str]) -> None:
        """Refuses a flag that rewrites what lies at a hook point which was not found in an adopted file."""
        for name in names:
            if name not in self.hooks:
                raise InputError(
                    f"{flag} cannot be set for this model: {name!r}, which it rewrites, is no hook point here."
                )

    def split_inputs(self, layer: int, split: bool) -> None:
        """Gives every head its own copy of the residual before ln1; with ``split`` one each for q, k and v."""
        cfg, tape = self.manifest.config, Tape()
        flag, part = "use_split_qkv_input" if split else "use_attn_in", sublayers(cfg, layer)[0]
        norm = [] if part.norm is None else [f"{part.norm}.hook_scale", f"{part.norm}.hook_normalized"]
        self._ensure_found(flag, [part.residual, *norm, *part.readers])
        if part.norm is not None:
            self._ensure(self._structure.is_norm(part.residual, part.norm), flag, part.residual, part.start)
        for end, (matrix, _) in part.readers.items():
            self._need(matrix)
            self._ensure(self._structure.reads(part, end, late=True), flag, part.start, end)
        residual = self._value(layer, "hook_resid_pre")
        for old in () if part.norm is None else ("ln1.hook_scale", "ln1.hook_normalized"):
            replaced = self._value(layer, old)
            replaced.name = f"{in_block(layer, old)}/replaced"
            if replaced in self.graph.outputs:
                self.graph.outputs.remove(replaced)

        def normed(x: ir.Value, suffix: str, heads: str) -> ir.Value:
            return x if part.norm is None else self._norm(layer, x, suffix, heads, tape)

        if split:
            heads = {"q": cfg.n_heads, "k": cfg.n_key_value_heads, "v": cfg.n_key_value_heads}
            inputs = {
                letter: normed(
                    self._copies(layer, residual, count, f"hook_{letter}_input", tape),
                    "" if letter == "v" else f"@{letter}",
                    "head_index" if letter == "q" else "key_value_head_index",
                )
                for letter, count in heads.items()
            }
        else:
            if cfg.n_heads != cfg.n_key_value_heads:
                raise InputError("use_attn_in needs as many key-value heads as heads; use_split_qkv_input does not.")
            copy = self._copies(layer, residual, cfg.n_heads, "hook_attn_in", tape)
            inputs = dict.fromkeys("qkv", normed(copy, "", "head_index"))
        added_late: dict[str, ir.Value] = {}
        for (hook, (matrix, bias)), x in zip(part.readers.items(), inputs.values(), strict=True):
            late = part.late.get(hook)
            if late is not None and late not in added_late:
                at = in_block(layer, f"{late}/axis")
                added_late[late] = tape.op("Unsqueeze", [self.values[self.hooks[late].value], integers(tape, [2], at)])
            x = x if late is None else tape.op("Add", [x, added_late[late]])
            product, added = self._per_head(x, matrix, tape), self._weight(bias, tape)
            self._replace(hook, product if added is None else tape.op("Add", [product, added]))
        self._install(tape, in_block(layer, "split/"))

    def results(self, layer: int) -> None:
        """Writes what attention's last matrix gives as a sum of the heads' results, before any norm of it."""
        cfg, tape = self.manifest.config, Tape()
        part = sublayers(cfg, layer)[0]
        self._ensure_found("use_attn_result", [part.inner, part.written])
        matrix, bias = part.out
        self._need(matrix)
        self._ensure(self._structure.writes(part), "use_attn_result", part.inner, part.written)
        summed = self._structure.summed(part)
        assert summed is not None, "it was found before"
        z = self._value(layer, "attn.hook_z")
        result = self._per_head(z, matrix, tape)
        _shape(result, z, cfg.n_heads, cfg.d_model)
        self._declare(in_block(layer, "attn.hook_result"), result, HEAD_RESIDUAL, cfg.dtype)
        axis = integers(tape, [2], in_block(layer, "result/axis"))
        total, added = tape.op("ReduceSum", [result, axis], {"keepdims": 0}), self._weight(bias, tape)
        total = total if added is None else tape.op("Add", [total, added])
        if part.post is None:
            self._replace(part.written, total)
        else:
            replace_value(summed, total)
        self._install(tape, in_block(layer, "result/"))

    def _copies(self, layer: int, residual: ir.Value, heads: int, name: str, tape: Tape) -> ir.Value:
        """The residual [b, s, heads, d_model], once for each head: a new hook point."""
        full, config = in_block(layer, name), self.manifest.config
        column = tape.op("Unsqueeze", [residual, integers(tape, [2], f"{full}/axis")])
        copy = tape.op("Expand", [column, integers(tape, [1, 1, heads, 1], f"{full}/heads")])
        _shape(copy, residual, heads, config.d_model)
        self._declare(full, copy, BLOCK[name], config.dtype)
        return copy

    def _norm(self, layer: int, x: ir.Value, suffix: str, heads: str, tape: Tape) -> ir.Value:
        """ln1 of x [b, s, heads, d_model], with its hook points named ``suffix`` behind."""
        config, at = self.manifest.config, in_block(layer, f"ln1{suffix}")
        assert x.dtype is not None
        copies, dtype = x, x.dtype.numpy()
        axis = integers(tape, [-1], f"{at}/axis")
        if config.centres:
            x = tape.op("Sub", [x, tape.op("ReduceMean", [x, axis])])
        # float16 has no room for squares: see surgery/precision.py.
        wide = np.dtype(np.float32) if dtype == np.float16 else dtype
        summed = x if wide == dtype else tape.op("Cast", [x], {"to": ir.DataType.FLOAT})
        variance = tape.op("ReduceMean", [tape.op("Mul", [summed, summed]), axis])
        eps = tape.initializer(ir.tensor(np.asarray(config.eps, wide)), name=f"{at}/eps")
        scale = tape.op("Sqrt", [tape.op("Add", [variance, eps])])
        scale = scale if wide == dtype else tape.op("Cast", [scale], {"to": ir.DataType.FLOAT16})
        normalized = tape.op("Div", [x, scale])
        count = config.n_heads if heads == "head_index" else config.n_key_value_heads
        for tail, value, size in (("hook_scale", scale, 1), ("hook_normalized", normalized, config.d_model)):
            _shape(value, copies, count, size)
            axes = ("batch", "pos", heads, "1" if size == 1 else "d_model")
            self._declare(in_block(layer, f"ln1.{tail}{suffix}"), value, axes, config.dtype)
        for op, name in zip(("Mul", "Add"), norm_weights(in_block(layer, "ln1")), strict=True):
            weight = self._weight(name, tape)
            normalized = normalized if weight is None else tape.op(op, [normalized, weight])
        return normalized

    def _per_head(self, x: ir.Value, name: str, tape: Tape) -> ir.Value:
        """Each head's x [b, s, heads, n] times its own part of a weight [heads, n, m]: [b, s, heads, m]."""
        weight = self._weight(name, tape)
        assert weight is not None, "it was looked for before"
        product = tape.op("MatMul", [tape.op("Transpose", [x], {"perm": [0, 2, 1, 3]}), weight])
        return tape.op("Transpose", [product], {"perm": [0, 2, 1, 3]})

    def _need(self, name: str) -> None:
        """Refuses a flag that needs a weight which has no place in the files."""
        if self._weights.entry(name) is None:
            raise InputError(f"this model's file does not say where its weight {name!r} lies, which this flag needs.")

    def _weight(self, name: str, tape: Tape) -> ir.Value | None:
        """A weight in the graph's compute dtype, as nodes that fold away when the graph is loaded; None for no weight."""
        entry = self._weights.entry(name)
        if entry is None:
            return None
        if name in self._made:
            return self._made[name]
        view, value = self._weights.views[name], self._weights.initializer(name)
        compute = ir.DataType.from_numpy(np.dtype(self.manifest.config.dtype))
        if value.dtype != compute:
            value = tape.op("Cast", [value], {"to": compute})
        self._made[name] = viewed(value, view, entry.shape, name, compute, tape)
        return self._made[name]

    def _value(self, layer: int, name: str) -> ir.Value:
        """The value that carries a hook point of a block."""
        return self.values[self.hooks[in_block(layer, name)].value]

    def _declare(self, name: str, value: ir.Value, axes: tuple[str, ...], dtype: str) -> None:
        """Makes a value a hook point and an output."""
        value.name = name
        self.hooks[name] = HookEntry(name, axes, dtype)
        self._added.append(value)
        self.values[name] = value

    def _replace(self, hook: str, new: ir.Value) -> None:
        """Lets a hook point be carried by a new value."""
        name = self.hooks[hook].value
        replace_value(self.values[name], new)
        self.values[name] = new

    def _install(self, tape: Tape, prefix: str) -> None:
        install(self.graph, tape, numbered(prefix, "_flagged_"))
        self._made.clear()


def viewed(
    value: ir.Value, view: WeightView, sizes: Sequence[int], name: str, dtype: ir.DataType, tape: Tape
) -> ir.Value:
    """What a view takes from a stored tensor, as nodes: what ``apply_view`` computes of an array.

    Args:
        value: The tensor.
        view: How the weight is taken from it.
        sizes: The tensor's shape.
        name: The weight's name, for the names of constants.
        dtype: The dtype of ``value``.
        tape: Takes the nodes.
    """
    shape = list(sizes)

    def stretch(value: ir.Value, axis: int, start: int, stop: int, label: str) -> ir.Value:
        shape[axis] = stop - start
        bounds = (("from", start), ("to", stop), ("axis", axis))
        return tape.op(
            "Slice", [value, *(integers(tape, [number], f"{name}/{label}_{part}") for part, number in bounds)]
        )

    def number(content: float, label: str) -> ir.Value:
        return tape.initializer(ir.tensor(np.asarray(content, dtype.numpy())), name=f"{name}/{label}")

    if view.take is not None:
        axis, part, parts = view.take
        size = shape[axis] // parts
        value = stretch(value, axis, part * size, (part + 1) * size, "part")
    if view.cut is not None:
        value = stretch(value, *view.cut, label="cut")
    if view.shape is not None:
        shape = list(view.shape)
        value = tape.op("Reshape", [value, integers(tape, shape, f"{name}/shape")])
    if view.within is not None:
        value = stretch(value, *view.within, label="within")
    if view.permute is not None:
        shape = [shape[axis] for axis in view.permute]
        value = tape.op("Transpose", [value], {"perm": list(view.permute)})
    if view.joined:
        shape = [shape[0] * shape[1], *shape[2:]]
        value = tape.op("Reshape", [value, integers(tape, shape, f"{name}/joined")])
    if view.times is not None:
        value = tape.op("Mul", [value, number(view.times, "times")])
    return value if view.plus is None else tape.op("Add", [value, number(view.plus, "plus")])


def _shape(value: ir.Value, like: ir.Value, heads: int, size: int) -> None:
    """Gives a value the shape [b, s, heads, size], with the batch and the sequence of another, and its type."""
    assert like.shape is not None
    value.shape = ir.Shape([like.shape[0], like.shape[1], heads, size])
    value.type = like.type


def _ancestors(value: ir.Value, until: ir.Value) -> set[ir.Node]:
    """The nodes that compute ``value`` from ``until``, and others it needs."""
    found: set[ir.Node] = set()
    waiting = [value]
    while waiting:
        current = waiting.pop()
        node = current.producer()
        if current is until or node is None or node in found:
            continue
        found.add(node)
        waiting += [given for given in node.inputs if given is not None]
    return found
