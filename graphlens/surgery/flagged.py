"""Hook points behind flags: rewrites that make a head's own input, or its own result, a value of the graph.

They are built from the manifest (weights by TransformerLens name, hook values), not from the shape of the traced
nodes, and what they replace is removed.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.tape import Tape

from graphlens.errors import InputError
from graphlens.file.manifest import HookEntry, Manifest, WeightView
from graphlens.file.names import BLOCK, FLAGGED, HEAD_RESIDUAL, axes_of, firing_order
from graphlens.file.safetensors import SafetensorsFile
from graphlens.surgery.graph import (
    INPUT_IDS,
    ensure_hooks_resolve,
    read_manifest,
    values_by_name,
    write_manifest,
)

FLAGS = tuple(dict.fromkeys(FLAGGED.values()))


def with_flagged(model: ir.Model, flags: Iterable[str]) -> ir.Model:
    """A copy with the hook points of the given flags (``use_attn_result``, ``use_split_qkv_input``, ``use_attn_in``,
    ``use_hook_mlp_in``, ``use_hook_tokens``) inserted, named and shaped as in TransformerLens.

    While attn_in or split inputs are on, ln1's hook points have a head axis. Raises InputError for an unknown flag, and
    for the two of them together.
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
        work.fork(INPUT_IDS, "hook_embed", "hook_tokens", "int64")
    for layer in range(work.manifest.config.n_layers):
        at = f"blocks.{layer}."
        if work.values.get(f"{at}attn.hook_q") is None:
            continue
        if wanted & {"use_attn_in", "use_split_qkv_input"}:
            work.split_inputs(layer, split="use_split_qkv_input" in wanted)
        if "use_attn_result" in wanted:
            work.results(layer)
        if "use_hook_mlp_in" in wanted:
            middle = work.hooks[f"{at}hook_resid_mid"].value
            work.fork(middle, f"{at}ln2.hook_normalized", f"{at}hook_mlp_in", work.manifest.config.dtype)
    return work.finish()


class _Rewrite:
    """One model being rewritten in place, with its hook map."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.graph = model, model.graph
        self.manifest: Manifest = read_manifest(model)
        self.hooks = dict(self.manifest.hooks)
        self.values = values_by_name(model)
        self._weights = _Weights(model, self.manifest)
        self._added: list[ir.Value] = []

    def finish(self) -> ir.Model:
        known = set(self.graph.outputs)
        self.graph.outputs.extend(value for value in self._added if value not in known)
        common_passes.RemoveUnusedNodesPass()(self.model)
        self.graph.sort()
        order = firing_order(self.hooks, self.manifest.config.n_layers)
        write_manifest(self.model, self.manifest.with_hooks({name: self.hooks[name] for name in order}))
        return ensure_hooks_resolve(self.model, "the graph with flagged hook points")

    def _declare(self, name: str, value: ir.Value, axes: tuple[str, ...], dtype: str) -> None:
        value.name = name
        self.hooks[name] = HookEntry(name, axes, dtype)
        self._added.append(value)
        self.values[name] = value

    def _replace(self, old: ir.Value, new: ir.Value) -> None:
        """Gives ``new`` the name, the readers and the place among the outputs of ``old``."""
        name = old.name
        new.shape, new.type = old.shape, old.type
        outputs = self.graph.outputs
        for index, output in enumerate(outputs):
            if output is old:
                outputs[index] = new
        old.replace_all_uses_with(new)
        old.name, new.name = f"{name}/replaced", name
        self.values[str(name)] = new

    def _install(self, tape: Tape, prefix: str) -> None:
        for initializer in tape.initializers:
            self.graph.initializers[str(initializer.name)] = initializer
        for index, node in enumerate(tape.nodes):
            node.name = f"{prefix}{node.op_type}_flagged_{index}"
            for output in node.outputs:
                output.name = output.name or node.name
        self.graph.extend(tape.nodes)

    def fork(self, source: str, reader: str, name: str, dtype: str) -> None:
        """Lets those readers of ``source`` that lead to the hook point ``reader`` read a copy, the new hook point."""
        value = self.values[source]
        upstream = _ancestors(self.values[self.hooks[reader].value], value)
        uses = [(node, index) for node, index in value.uses() if node in upstream]
        tape = Tape()
        copy = tape.op("Identity", [value])
        copy.shape, copy.type = value.shape, value.type
        for node, index in uses:
            node.replace_input_with(index, copy)
        self._declare(name, copy, axes_of(name), dtype)
        self._install(tape, f"{name}/")

    def split_inputs(self, layer: int, split: bool) -> None:
        """Gives every head its own copy of the residual before ln1; with ``split`` one each for q, k and v."""
        cfg, at = self.manifest.config, f"blocks.{layer}."
        residual = self.values[self.hooks[f"{at}hook_resid_pre"].value]
        tape = Tape()
        dtype = residual.dtype
        assert dtype is not None
        number = partial(_number, tape, dtype, at)
        for old in ("ln1.hook_scale", "ln1.hook_normalized"):
            replaced = self.values[self.hooks[at + old].value]
            replaced.name = f"{at}{old}/replaced"
            if replaced in self.graph.outputs:
                self.graph.outputs.remove(replaced)

        def copies(heads: int, name: str) -> ir.Value:
            column = tape.op("Unsqueeze", [residual, number([2], f"{name}/axis", np.int64)])
            copy = tape.op("Expand", [column, number([1, 1, heads, 1], f"{name}/heads", np.int64)])
            self._shape(copy, residual, heads, cfg.d_model)
            self._declare(at + name, copy, BLOCK[name], cfg.dtype)
            return copy

        def norm(x: ir.Value, suffix: str, heads: str) -> ir.Value:
            axis = number([-1], f"ln1{suffix}/axis", np.int64)
            if cfg.normalization_type.startswith("LN"):
                x = tape.op("Sub", [x, tape.op("ReduceMean", [x, axis])])
            variance = tape.op("ReduceMean", [tape.op("Mul", [x, x]), axis])
            scale = tape.op("Sqrt", [tape.op("Add", [variance, number(cfg.eps, f"ln1{suffix}/eps")])])
            normalized = tape.op("Div", [x, scale])
            count = cfg.n_heads if heads == "head_index" else cfg.n_key_value_heads
            for tail, value, size in (("hook_scale", scale, 1), ("hook_normalized", normalized, cfg.d_model)):
                self._shape(value, residual, count, size)
                axes = ("batch", "pos", heads, "1" if size == 1 else "d_model")
                self._declare(f"{at}ln1.{tail}{suffix}", value, axes, cfg.dtype)
            for op, part in (("Mul", "w"), ("Add", "b")):
                weight = self._weights.value(f"{at}ln1.{part}", tape)
                normalized = normalized if weight is None else tape.op(op, [normalized, weight])
            return normalized

        if split:
            heads = {"q": cfg.n_heads, "k": cfg.n_key_value_heads, "v": cfg.n_key_value_heads}
            inputs = {
                letter: norm(
                    copies(count, f"hook_{letter}_input"),
                    "" if letter == "v" else f"@{letter}",
                    "head_index" if letter == "q" else "key_value_head_index",
                )
                for letter, count in heads.items()
            }
        else:
            if cfg.n_heads != cfg.n_key_value_heads:
                raise InputError("use_attn_in needs as many key-value heads as heads; use_split_qkv_input does not.")
            inputs = dict.fromkeys("qkv", norm(copies(cfg.n_heads, "hook_attn_in"), "", "head_index"))
        for letter, x in inputs.items():
            weight = self._weights.value(f"{at}attn.W_{letter.upper()}", tape)
            product = tape.op("MatMul", [tape.op("Transpose", [x], {"perm": [0, 2, 1, 3]}), weight])
            heads_last = tape.op("Transpose", [product], {"perm": [0, 2, 1, 3]})
            bias = self._weights.value(f"{at}attn.b_{letter.upper()}", tape)
            new = heads_last if bias is None else tape.op("Add", [heads_last, bias])
            self._replace(self.values[self.hooks[f"{at}attn.hook_{letter}"].value], new)
        self._install(tape, f"{at}split/")

    def results(self, layer: int) -> None:
        """Writes the attention output as a sum of the heads' results."""
        cfg, at = self.manifest.config, f"blocks.{layer}."
        z = self.values[self.hooks[f"{at}attn.hook_z"].value]
        tape = Tape()
        weight = self._weights.value(f"{at}attn.W_O", tape)
        product = tape.op("MatMul", [tape.op("Transpose", [z], {"perm": [0, 2, 1, 3]}), weight])
        result = tape.op("Transpose", [product], {"perm": [0, 2, 1, 3]})
        self._shape(result, z, cfg.n_heads, cfg.d_model)
        self._declare(f"{at}attn.hook_result", result, HEAD_RESIDUAL, cfg.dtype)
        axis = tape.initializer(ir.tensor(np.asarray([2], np.int64)), name=f"{at}result/axis")
        total = tape.op("ReduceSum", [result, axis], {"keepdims": 0})
        bias = self._weights.value(f"{at}attn.b_O", tape)
        new = total if bias is None else tape.op("Add", [total, bias])
        self._replace(self.values[self.hooks[f"{at}hook_attn_out"].value], new)
        self._install(tape, f"{at}result/")

    @staticmethod
    def _shape(value: ir.Value, like: ir.Value, heads: int, size: int) -> None:
        assert like.shape is not None
        value.shape = ir.Shape([like.shape[0], like.shape[1], heads, size])
        value.type = like.type


def _number(tape: Tape, dtype: ir.DataType, at: str, number: object, name: str, kind: type | None = None) -> ir.Value:
    array = np.asarray(number, kind if kind is not None else dtype.numpy())
    return tape.initializer(ir.tensor(array), name=f"{at}{name}")


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


class _Weights:
    """Weights as values of the graph: views of its initializers, written as nodes that fold away when it is loaded."""

    def __init__(self, model: ir.Model, manifest: Manifest) -> None:
        self._views, self._dtype = manifest.weights, manifest.config.dtype
        self._files: dict[Path, SafetensorsFile] = {}
        self._at: dict[tuple[str, int], ir.Value] = {}
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                self._at[str(tensor.location), int(tensor.offset or 0)] = value
                self._folder = Path(tensor.base_dir)

    def value(self, name: str, tape: Tape) -> ir.Value | None:
        """The weight of a TransformerLens name in the graph's compute dtype, or None where the model has none."""
        view = self._views.get(name)
        return None if view is None else self._viewed(name, view, tape)

    def _viewed(self, name: str, view: WeightView, tape: Tape) -> ir.Value:
        path = self._folder / view.file
        if path not in self._files:
            self._files[path] = SafetensorsFile(path)
        value = self._at[view.file, self._files[path].entries[view.tensor].offset]
        compute = ir.DataType[{"float32": "FLOAT", "float64": "DOUBLE", "float16": "FLOAT16"}[self._dtype]]
        if value.dtype != compute:
            value = tape.op("Cast", [value], {"to": compute})

        def integers(numbers: Iterable[int], label: str) -> ir.Value:
            return tape.initializer(ir.tensor(np.asarray(list(numbers), np.int64)), name=f"{name}/{label}")

        if view.take is not None:
            axis, part, parts = view.take
            shape = self._files[path].entries[view.tensor].shape
            size = shape[axis] // parts
            value = tape.op(
                "Slice",
                [value, integers([part * size], "from"), integers([(part + 1) * size], "to"), integers([axis], "axis")],
            )
        if view.shape is not None:
            value = tape.op("Reshape", [value, integers(view.shape, "shape")])
        if view.permute is not None:
            value = tape.op("Transpose", [value], {"perm": list(view.permute)})
        return value
