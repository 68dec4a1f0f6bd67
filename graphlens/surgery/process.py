"""Weight processing: TransformerLens's rewrites of the weights that leave the model's predictions as they are.

A hooked file goes in and another comes out, with a weights file of its own; no torch. The arithmetic is in float32 with
means taken in float64.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphlens.errors import ExportError, InputError
from graphlens.file.copies import ensure_room
from graphlens.file.folder import MODEL_FILE, copy_settings, model_path, new_folder, user_path
from graphlens.file.io_names import LOGITS
from graphlens.file.manifest import HookEntry, Manifest, WeightView
from graphlens.file.names import split_name
from graphlens.file.processing import FOLDED_NORMS, STEPS, ensure_own, steps_for
from graphlens.file.safetensors import Array, SafetensorsFile, TensorEntry, apply_view, put_view, write_safetensors
from graphlens.file.stored import StoredWeights, bind, stored_tensor
from graphlens.surgery.files import load, write_graph
from graphlens.surgery.fingerprint import fingerprint
from graphlens.surgery.graph import finish, read_manifest, replace_value, set_outputs
from graphlens.surgery.processable import ensure_processable, has_value_bias, plain_sublayers
from graphlens.surgery.processed import process_group
from graphlens.surgery.structure import stored_weight
from graphlens.surgery.sublayers import sublayers

WEIGHTS_FILE = "processed.safetensors"
_UNEMBED, _UNEMBED_BIAS = "unembed.weight", "unembed.bias"
_OF_UNEMBEDDING = ("unembed.W_U", "unembed.b_U")


def process_weights(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    fold_ln: bool = True,
    center_writing_weights: bool = True,
    center_unembed: bool = True,
    fold_value_biases: bool = True,
    refactor_factored_attn_matrices: bool = False,
    announce: Callable[[str], object] = warnings.warn,
) -> Path:
    """Writes a hooked folder with processed weights, which leave the model's predictions as they are. Needs no torch.

    The steps are TransformerLens's, in its order. Those that do not apply to an architecture are left out, as it leaves them
    out: writing weights are not centred where the norms do not centre (RMSNorm), nor is anything folded or centred where
    norms come after the sublayers alone (OLMo 2), nor the unembedding where the logits are squeezed by tanh.

    Args:
        path: A hooked folder or its graph file.
        out: The folder to write, absent or empty.
        fold_ln: Moves the norms' weights and biases into what reads them and centres that. A norm's output is then its
            hook_normalized. Norms after a sublayer and norms of queries and keys stay.
        center_writing_weights: Centres what writes to the residual stream.
        center_unembed: Centres the logits over the vocabulary: they change by a constant at each position.
        fold_value_biases: Moves b_V into b_O.
        refactor_factored_attn_matrices: Rewrites W_Q W_K^T and W_V W_O of each head by their singular value
            decompositions, so that both factors have the same scale.
        announce: Called with a sentence for each step that is left out though one would expect it.

    Returns:
        ``out``.

    Raises:
        ModelFileError: ``path`` is no hooked file.
        ExportError: The weights are processed already or are not float32, the model computes something else than its
            manifest says, or lacks a weight there, a step cannot be done for its architecture, or ``out`` is not empty or
            cannot be written.
    """
    asked = (
        fold_ln, center_writing_weights, center_unembed, fold_value_biases, refactor_factored_attn_matrices,
    )  # fmt: skip
    chosen = tuple(step for step, on in zip(STEPS, asked, strict=True) if on)
    with new_folder(out) as stage:
        for note in process_into(model_path(path), stage, chosen):
            announce(note)
    return user_path(out)


def process_into(source: Path, stage: Path, steps: Sequence[str]) -> list[str]:
    """Writes a model with processed weights into a folder.

    Args:
        source: The graph file of a hooked model.
        stage: The folder.
        steps: Which of STEPS to do; the order is always theirs.

    Returns:
        Why some of them were left out, a sentence each: see steps_for.

    Raises:
        InputError: There is no such step.
        ExportError: The model cannot be processed; see process_weights.
    """
    if set(steps) - set(STEPS):
        raise InputError(f"unknown processing {sorted(set(steps) - set(STEPS))[0]!r}: there is {', '.join(STEPS)}.")
    model = load(source)
    manifest = read_manifest(model)
    ensure_own(manifest, source, "The weights of such files are not processed")
    chosen, notes = steps_for(manifest, steps)
    if manifest.config.residual_norms or "embed.W_project" in manifest.weights:
        raise ExportError(f"{source}: its weights are not processed. {' '.join(notes)}")
    ensure_processable(source, model, manifest, chosen)
    work = _Processing(model, manifest, chosen)
    work.write(stage / WEIGHTS_FILE)
    done = work.rebind(stage / WEIGHTS_FILE)
    write_graph(finish(model, done, "the processed graph"), stage / MODEL_FILE)
    copy_settings(source.parent, stage)
    return notes


class _Processing:
    """One model being processed, a block in memory at a time."""

    def __init__(self, model: ir.Model, manifest: Manifest, steps: Sequence[str]) -> None:
        self.model, self.manifest, self.steps = model, manifest, steps
        self._stored = StoredWeights(model, manifest)
        self._views = dict(manifest.weights)
        # W_U gets a tensor of its own, since the embedding it may be tied to is not processed as it is.
        self._views["unembed.W_U"] = replace(self._views["unembed.W_U"], tensor=_UNEMBED)
        folded = FOLDED_NORMS if "fold_ln" in steps else ()
        self._dropped = {name for name in self._views if split_name(name)[1].rpartition(".")[0] in folded}
        self._made: dict[str, tuple[str, int]] = {}  # tensor of a new bias -> (the matrix's weight, its size)
        self._make_biases()
        if "unembed.b_U" in self._views:
            self._views["unembed.b_U"] = WeightView(self._views["unembed.W_U"].file, _UNEMBED_BIAS)
            self._made.setdefault(_UNEMBED_BIAS, ("unembed.W_U", manifest.config.d_vocab_out))

    def _make_biases(self) -> None:
        """Names the biases that this model lacks and processing needs: those that take in a norm's, or the values'."""
        config = self.manifest.config
        for layer in range(config.n_layers):
            for part in plain_sublayers(config, layer):
                if f"{part.norm}.b" in self._dropped:
                    for matrix, bias in part.readers.values():
                        self._make_bias(matrix, bias)
                if f"{part.inner_norm}.b" in self._dropped:
                    self._make_bias(*part.out)
            if has_value_bias(self.manifest, self.steps, layer):
                self._make_bias(*sublayers(config, layer)[0].out)
        if "ln_final.b" in self._dropped:
            self._views.setdefault("unembed.b_U", self._views["unembed.W_U"])

    def _make_bias(self, matrix: str, bias: str) -> None:
        """Gives a matrix that has no bias one of zeros; a tensor of several matrices gets one of several biases."""
        if bias in self._views:
            return
        view, entry, weight = self._views[matrix], self._stored.entry(matrix), self._stored.initializer(matrix)
        assert entry is not None, "the place of every matrix was looked for"
        ((node, _),) = weight.uses()
        outputs = entry.shape[0 if _is_transposed(node) else 1]
        tensor = f"{view.tensor.removesuffix('.weight')}.bias"
        self._made[tensor] = (matrix, outputs)
        self._views[bias] = _bias_of(view, tensor, by_head=matrix[-1] in "QKV")

    def _key(self, name: str) -> str:
        """The tensor that a weight is a view of, in the new file."""
        return self._views[name].tensor

    def _groups(self) -> Iterator[list[str]]:
        """Weight names of the embeddings, of each block, and of the end."""
        ends = ("ln_final.w", "ln_final.b", "unembed.W_U", "unembed.b_U")
        yield [name for name in self._views if split_name(name)[0] is None and name not in ends]
        for layer in range(self.manifest.config.n_layers):
            yield [name for name in self._views if split_name(name)[0] == layer]
        yield [name for name in ends if name in self._views]

    def _processed(self) -> Iterator[tuple[str, Array]]:
        """The tensors of the new file, in its order."""
        for names in self._groups():
            tensors: dict[str, Array] = {}
            weights: dict[str, Array] = {}
            for name in names:
                key = self._key(name)
                if key not in tensors:
                    # The unembedding's bias has a tensor of its own, whether there was one or not.
                    made = key in self._made and name not in self.manifest.weights
                    tensors[key] = (
                        np.zeros(self._made[key][1], np.float32) if made else np.array(self._stored.array(name))
                    )
                weights[split_name(name)[1]] = apply_view(tensors[key], self._views[name])
            process_group(weights, self.steps, self.manifest.config)
            for name in names:
                _put_back(tensors[self._key(name)], self._views[name], weights[split_name(name)[1]])
            dropped = {self._key(name) for name in names if name in self._dropped}
            yield from ((key, array) for key, array in tensors.items() if key not in dropped)

    def write(self, path: Path) -> None:
        """Writes the processed tensors, block by block."""
        entries: dict[str, TensorEntry] = {}
        for name in (name for group in self._groups() for name in group):
            key, entry = self._key(name), self._stored.entry(name)
            if name in self._dropped or key in entries:
                continue
            shape = (self._made[key][1],) if entry is None else entry.shape
            entries[key] = TensorEntry("F32", shape, 0, math.prod(shape) * 4)
        ensure_room(path.parent, sum(entry.length for entry in entries.values()))
        order = iter(entries)

        def arrays() -> Iterator[Array]:
            for key, array in self._processed():
                assert key == next(order)
                yield array

        write_safetensors(path, entries, arrays())

    def rebind(self, path: Path) -> Manifest:
        """Points the graph at the new file, in place, and takes out of it what is folded. Returns its new manifest."""
        entries = SafetensorsFile(path).entries
        hooks = dict(self.manifest.hooks)
        old = {name: self._stored.initializer(name) for name in self.manifest.weights}
        for value in {id(old[name]): old[name] for name in self._dropped}.values():
            _skip(self.model, value, hooks)
        self._untie(old["unembed.W_U"], path, entries)
        for tensor, (matrix, _) in self._made.items():
            if tensor != _UNEMBED_BIAS:
                ((node, _),) = old[matrix].uses()
                self._put_gemm(node, [*node.inputs[:2], self._initializer(tensor, path, entries)])
        bound = {id(value): name for name, value in old.items() if name not in (*self._dropped, *_OF_UNEMBEDDING)}
        for value in list(self.model.graph.initializers.values()):
            if id(value) in bound:
                bind(value, path, entries[self._key(bound[id(value)])])
        views = {n: replace(view, file=path.name) for n, view in self._views.items() if n not in self._dropped}
        prints = {path.name: fingerprint(path)}
        return replace(self.manifest, hooks=hooks, weights=views, files=prints, processing=tuple(self.steps))

    def _untie(self, shared: ir.Value, path: Path, entries: Mapping[str, TensorEntry]) -> None:
        """Gives the unembedding an initializer of its own, with its bias."""
        graph = self.model.graph
        (node,) = (node for node, _ in shared.uses() if node.op_type != "Gather")
        old_bias = node.inputs[2] if len(node.inputs) > 2 else None
        # First what is replaced: an unembedding of its own may have the names of the new one already.
        for value in (shared, old_bias):
            if value is not None and len(value.uses()) == 1:
                del graph.initializers[str(value.name)]
        inputs = [
            value if value is not shared else self._initializer(_UNEMBED, path, entries) for value in node.inputs[:2]
        ]
        if "unembed.b_U" in self._views:
            inputs.append(self._initializer(_UNEMBED_BIAS, path, entries))
        self._put_gemm(node, inputs)

    def _initializer(self, key: str, path: Path, entries: Mapping[str, TensorEntry]) -> ir.Value:
        """A new initializer that holds a tensor of the new file."""
        content = stored_tensor(path, entries[key], key)
        value = ir.Value(name=key, shape=content.shape, type=ir.TensorType(content.dtype), const_value=content)
        self.model.graph.initializers[key] = value
        return value

    def _put_gemm(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> None:
        """Puts a product with other inputs in the place of one."""
        if node.op_type != "Gemm":
            raise ExportError(f"internal error: {node.name} is a {node.op_type}, not a Gemm")
        new = ir.Node("", "Gemm", inputs, list(node.attributes.values()), num_outputs=1, name=node.name)
        self.model.graph.insert_after(node, new)
        replace_value(node.outputs[0], new.outputs[0])
        self.model.graph.remove(node, safe=True)


def _is_transposed(node: ir.Node) -> bool:
    """True if a product reads its matrix as it is stored in [output, input]."""
    attribute = node.attributes.get("transB")
    return attribute is not None and attribute.as_int() == 1


def _bias_of(view: WeightView, tensor: str, by_head: bool) -> WeightView:
    """Where a matrix's bias lies in a new tensor, which has an entry for each output of the stored matrix.

    Args:
        view: The matrix's view.
        tensor: The new tensor.
        by_head: True for W_Q, W_K and W_V, whose outputs are those of each head.
    """
    take = None if view.take is None else (0, *view.take[1:])
    cut = None if view.cut is None else (0, *view.cut[1:])
    if not by_head:
        return WeightView(view.file, tensor, take=take, cut=cut, times=view.times)
    assert view.shape is not None, "a matrix by heads has axes of heads"
    order = list(view.permute or range(len(view.shape)))
    inputs = order.pop(-2)  # of [..., heads, d_model, d_head]
    shape = tuple(size for axis, size in enumerate(view.shape) if axis != inputs)
    order = [axis - (axis > inputs) for axis in order]
    permute = None if order == sorted(order) else tuple(order)
    return replace(view, tensor=tensor, take=take, cut=cut, shape=shape, permute=permute)


def _put_back(tensor: Array, view: WeightView, weight: Array) -> None:
    """Writes a weight that was processed into its tensor, unless it is a view of the tensor or stayed as it was."""
    if not np.may_share_memory(tensor, weight) and not np.array_equal(apply_view(tensor, view), weight):
        put_view(tensor, view, weight)


def _skip(model: ir.Model, weight: ir.Value, hooks: dict[str, HookEntry]) -> None:
    """Removes the nodes that apply a norm's weight or bias; what each gave becomes what it took, hooks included."""
    graph = model.graph
    for node, index in list(weight.uses()):
        shifted = None if node.op_type != "Add" else stored_weight(node.outputs[0])
        if shifted is not None and shifted[0] is weight:  # the factor is the weight plus a number
            (reader,) = list(node.outputs[0].uses())
            _bypass(model, *reader, hooks)
            graph.remove(node, safe=True)
        else:
            _bypass(model, node, index, hooks)
    del graph.initializers[str(weight.name)]


def _bypass(model: ir.Model, node: ir.Node, index: int, hooks: dict[str, HookEntry]) -> None:
    """Removes a node that applies its input number ``index`` to its other one, which then is what the node gave."""
    (kept,) = (value for i, value in enumerate(node.inputs) if i != index)
    gone = node.outputs[0]
    assert kept is not None
    assert gone.name != LOGITS
    for name, entry in hooks.items():
        if entry.value == gone.name:
            hooks[name] = replace(entry, value=str(kept.name))
    set_outputs(model.graph, [value for value in model.graph.outputs if value is not gone])
    gone.replace_all_uses_with(kept)
    model.graph.remove(node, safe=True)
