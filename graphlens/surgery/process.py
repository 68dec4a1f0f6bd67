"""Weight processing: TransformerLens's rewrites of the weights that leave the model's predictions as they are.

A hooked file goes in and another comes out, with a weights file of its own; no torch. The arithmetic is in float32 with
means taken in float64.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphlens.errors import ExportError, InputError
from graphlens.file.copies import ensure_room
from graphlens.file.folder import MODEL_FILE, copy_settings, model_path, new_folder, user_path
from graphlens.file.io_names import LOGITS
from graphlens.file.manifest import HookEntry, Manifest, WeightView
from graphlens.file.names import in_block, split_name
from graphlens.file.safetensors import Array, SafetensorsFile, TensorEntry, apply_view, write_safetensors
from graphlens.file.stored import StoredWeights, bind, stored_tensor
from graphlens.surgery.files import load, write_graph
from graphlens.surgery.fingerprint import fingerprint
from graphlens.surgery.graph import finish, read_manifest, replace_value, set_outputs
from graphlens.surgery.structure import Structure

WEIGHTS_FILE = "processed.safetensors"
STEPS = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)
_UNEMBED, _UNEMBED_BIAS = "unembed.weight", "unembed.bias"
# What is processed. Without its place in the files a weight would silently stay as it is.
_OF_MODEL = ("embed.W_E", "ln_final.w", "ln_final.b", "unembed.W_U")
_OF_BLOCK = (
    *("ln1.w", "ln1.b", "attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O"),
    *("ln2.w", "ln2.b", "mlp.W_in", "mlp.W_out"),
)


def process_weights(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    fold_ln: bool = True,
    center_writing_weights: bool = True,
    center_unembed: bool = True,
    fold_value_biases: bool = True,
    refactor_factored_attn_matrices: bool = False,
) -> Path:
    """Writes a hooked folder with processed weights, which leave the model's predictions as they are. Needs no torch.

    The steps are TransformerLens's, in its order.

    Args:
        path: A hooked folder or its graph file.
        out: The folder to write, absent or empty.
        fold_ln: Moves the norms' weights and biases into what reads them and centres that. A norm's output is then its
            hook_normalized.
        center_writing_weights: Centres what writes to the residual stream.
        center_unembed: Centres the logits over the vocabulary: they change by a constant at each position.
        fold_value_biases: Moves b_V into b_O.
        refactor_factored_attn_matrices: Rewrites W_Q W_K^T and W_V W_O of each head by their singular value
            decompositions, so that both factors have the same scale.

    Returns:
        ``out``.

    Raises:
        ModelFileError: ``path`` is no hooked file.
        ExportError: The weights are processed already or are not float32, the model's norms are not LayerNorm, its
            manifest lacks a weight, or ``out`` is not empty or cannot be written.
    """
    asked = (
        fold_ln, center_writing_weights, center_unembed, fold_value_biases, refactor_factored_attn_matrices,
    )  # fmt: skip
    chosen = tuple(step for step, on in zip(STEPS, asked, strict=True) if on)
    with new_folder(out) as stage:
        process_into(model_path(path), stage, chosen)
    return user_path(out)


def process_into(source: Path, stage: Path, steps: Sequence[str]) -> None:
    """Writes a model with processed weights into a folder.

    Args:
        source: The graph file of a hooked model.
        stage: The folder.
        steps: Which of STEPS to do; the order is always theirs.

    Raises:
        InputError: There is no such step.
        ExportError: The model cannot be processed; see process_weights.
    """
    if set(steps) - set(STEPS):
        raise InputError(f"unknown processing {sorted(set(steps) - set(STEPS))[0]!r}: there is {', '.join(STEPS)}.")
    model = load(source)
    manifest = read_manifest(model)
    _check(source, manifest)
    _check_structure(source, Structure(model, manifest), manifest)
    work = _Processing(model, manifest, steps)
    work.write(stage / WEIGHTS_FILE)
    done = work.rebind(stage / WEIGHTS_FILE)
    write_graph(finish(model, done, "the processed graph"), stage / MODEL_FILE)
    copy_settings(source.parent, stage)


def _check(source: Path, manifest: Manifest) -> None:
    config = manifest.config
    if manifest.processing:
        raise ExportError(f"{source}: its weights are processed already ({', '.join(manifest.processing)}).")
    if config.dtype != "float32":
        raise ExportError(f"{source}: holds {config.dtype} weights. Process the float32 model, then convert it.")
    if config.normalization_type != "LN":
        raise ExportError(
            f"{source}: weight processing knows LayerNorm, and this model has {config.normalization_type}."
        )
    parts = [name for name in _OF_BLOCK if not (config.attn_only and name.startswith(("ln2", "mlp")))]
    positions = ["pos_embed.W_pos"] if config.positional_embedding_type == "standard" else []
    needed = [*_OF_MODEL, *positions, *(in_block(layer, name) for layer in range(config.n_layers) for name in parts)]
    missing = [name for name in needed if name not in manifest.weights]
    if missing:
        raise ExportError(f"{source}: does not say where its weight {missing[0]!r} lies, so it cannot be processed.")


def _check_structure(source: Path, structure: Structure, manifest: Manifest) -> None:
    """Refuses a model that computes something else than the architecture whose weights are processed.

    A norm after attention, a matrix that reads a norm besides those that it is folded into, a bias without a name: what was
    processed would then predict something else, without a word.
    """
    layers, config = range(manifest.config.n_layers), manifest.config

    def ensure(is_so: bool, start: str, end: str) -> None:
        if not is_so:
            raise ExportError(
                f"{source}: cannot be processed: between {start!r} and {end!r} this model computes something else than a norm "
                "and the weights that TransformerLens names (a norm of its own there, an edit that was baked in, a second "
                "matrix, or a weight or bias without a name), so its predictions would change."
            )

    embedded = [name for name in ("hook_embed", "hook_pos_embed") if name in manifest.hooks]
    residual = in_block(0, "hook_resid_pre")
    ensure(structure.is_sum(residual, embedded), embedded[0], residual)
    for layer in layers:
        pre, mid, post = (in_block(layer, f"hook_resid_{place}") for place in ("pre", "mid", "post"))
        written = []
        for norm, start, readers, z, out in (
            (
                "ln1",
                pre,
                {f"attn.hook_{letter}": f"attn.{{}}_{letter.upper()}" for letter in "qkv"},
                "attn.hook_z",
                "attn",
            ),
            ("ln2", mid, {"mlp.hook_pre": "mlp.{}_in"}, "mlp.hook_post", "mlp"),
        ):
            if norm == "ln2" and config.attn_only:
                continue
            full = in_block(layer, norm)
            normal, ends = f"{full}.hook_normalized", [in_block(layer, reader) for reader in readers]
            ensure(structure.is_norm(start, full), start, normal)
            for end, weights in zip(ends, readers.values(), strict=True):
                names = [f"{full}.w", f"{full}.b", *(in_block(layer, weights.format(kind)) for kind in "Wb")]
                ensure(structure.is_linear(normal, end, names), normal, end)
            ensure(structure.nothing_leaves(normal, ends), normal, ends[0])
            written.append(in_block(layer, f"hook_{out}_out"))
            matrix = [in_block(layer, f"{out}.{kind}_{'O' if out == 'attn' else 'out'}") for kind in "Wb"]
            ensure(structure.is_linear(in_block(layer, z), written[-1], matrix), in_block(layer, z), written[-1])
        ensure(structure.is_sum(mid, [pre, written[0]]), written[0], mid)
        ensure(structure.is_sum(post, [mid, written[1]] if len(written) > 1 else [mid]), written[-1], post)
    last = in_block(layers[-1], "hook_resid_post")
    names = ["ln_final.w", "ln_final.b", "unembed.W_U", "unembed.b_U"]
    ensure(structure.is_norm(last, "ln_final"), last, "ln_final.hook_normalized")
    ensure(
        structure.is_linear("ln_final.hook_normalized", "unembed.hook_out", names), "ln_final.hook_normalized", LOGITS
    )
    for layer in layers:
        for name in ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"):
            hook = in_block(layer, name)
            ensure(hook not in manifest.hooks or structure.only_known_read(hook), hook, LOGITS)


class _Processing:
    """One model being processed, a block in memory at a time."""

    def __init__(self, model: ir.Model, manifest: Manifest, steps: Sequence[str]) -> None:
        self.model, self.manifest, self.steps = model, manifest, steps
        self._stored = StoredWeights(model, manifest)
        self._views = dict(manifest.weights)
        self._folded = "fold_ln" in steps
        # W_U gets a tensor of its own, since the embedding it may be tied to is not processed as it is.
        self._views["unembed.W_U"] = replace(self._views["unembed.W_U"], tensor=_UNEMBED)
        self._has_bias = self._folded or "unembed.b_U" in self._views
        if self._has_bias:
            file = self._views["unembed.W_U"].file
            self._views["unembed.b_U"] = WeightView(file, _UNEMBED_BIAS)
        self._dropped = {name for name in self._views if self._folded and name.split(".")[-2].startswith("ln")}

    def _key(self, name: str) -> str:
        """The tensor that a weight is a view of, in the new file."""
        return self._views[name].tensor

    def _groups(self) -> Iterator[list[str]]:
        """Weight names of the embeddings, of each block, and of the end."""
        yield [name for name in ("embed.W_E", "pos_embed.W_pos") if name in self._views]
        for layer in range(self.manifest.config.n_layers):
            yield [name for name in self._views if split_name(name)[0] == layer]
        yield [name for name in ("ln_final.w", "ln_final.b", "unembed.W_U", "unembed.b_U") if name in self._views]

    def _processed(self) -> Iterator[tuple[str, Array]]:
        """The tensors of the new file, in its order."""
        for names in self._groups():
            tensors: dict[str, Array] = {}
            weights: dict[str, Array] = {}
            for name in names:
                key = self._key(name)
                if key not in tensors:
                    made = name not in self.manifest.weights  # b_U
                    vocabulary = self.manifest.config.d_vocab
                    tensors[key] = np.zeros(vocabulary, np.float32) if made else np.array(self._stored.array(name))
                weights[split_name(name)[1]] = apply_view(tensors[key], self._views[name])
            _process(weights, self.steps)
            dropped = {self._key(name) for name in names if name in self._dropped}
            yield from ((key, array) for key, array in tensors.items() if key not in dropped)

    def write(self, path: Path) -> None:
        """Writes the processed tensors, block by block."""
        entries: dict[str, TensorEntry] = {}
        for name in (name for group in self._groups() for name in group):
            key, entry = self._key(name), self._stored.entry(name)
            if name in self._dropped or key in entries:
                continue
            shape = (self.manifest.config.d_vocab,) if entry is None else entry.shape  # b_U, where there was none
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
        for name in self._dropped:
            _skip(self.model, old[name], hooks)
        self._untie(old["unembed.W_U"], path, entries)
        bound = {id(value): name for name, value in old.items() if name not in (*self._dropped, "unembed.W_U")}
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
        if node.op_type != "Gemm":
            raise ExportError(f"internal error: the unembedding is a {node.op_type}, not a Gemm")

        def initializer(key: str) -> ir.Value:
            content = stored_tensor(path, entries[key], key)
            value = ir.Value(name=key, shape=content.shape, type=ir.TensorType(content.dtype), const_value=content)
            graph.initializers[key] = value
            return value

        inputs = [value if value is not shared else initializer(_UNEMBED) for value in node.inputs[:2]]
        if self._has_bias:
            inputs.append(initializer(_UNEMBED_BIAS))
        new = ir.Node("", "Gemm", inputs, list(node.attributes.values()), num_outputs=1, name=node.name)
        graph.insert_after(node, new)
        replace_value(node.outputs[0], new.outputs[0])
        graph.remove(node, safe=True)
        if not shared.uses():
            del graph.initializers[str(shared.name)]


def _skip(model: ir.Model, weight: ir.Value, hooks: dict[str, HookEntry]) -> None:
    """Removes the one node that applies a norm's weight or bias; what it gave becomes what it took, hooks included."""
    ((node, index),) = weight.uses()
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
    del model.graph.initializers[str(weight.name)]


def _centre(weight: Array, axis: int) -> None:
    """Takes the mean along an axis away, in place."""
    weight -= weight.mean(axis, keepdims=True, dtype=np.float64).astype(weight.dtype)


# Norm -> the matrices that read it, each with its bias.
_READ_BY: Mapping[str, tuple[tuple[str, str], ...]] = {
    "ln1": tuple((f"attn.W_{letter}", f"attn.b_{letter}") for letter in "QKV"),
    "ln2": (("mlp.W_in", "mlp.b_in"),),
    "ln_final": (("unembed.W_U", "unembed.b_U"),),
}
_WRITING = ("embed.W_E", "pos_embed.W_pos", "attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out")


def _process(weights: Mapping[str, Array], steps: Sequence[str]) -> None:
    """Processes one group of weights in place, whatever of them it holds."""
    if "fold_ln" in steps:
        for norm, readers in _READ_BY.items():
            if f"{norm}.w" in weights:
                _fold_norm(weights, norm, readers)
    centred = _WRITING if "center_writing_weights" in steps else ()
    for name in (*centred, *(("unembed.W_U", "unembed.b_U") if "center_unembed" in steps else ())):
        if name in weights:
            _centre(weights[name], -1)
    if "attn.W_O" not in weights:
        return
    if "fold_value_biases" in steps or "refactor_factored_attn_matrices" in steps:
        weights["attn.b_O"][...] += np.einsum("hd,hdD->D", weights["attn.b_V"], weights["attn.W_O"])
        weights["attn.b_V"][...] = 0
    if "refactor_factored_attn_matrices" in steps:
        _refactor(weights)


def _fold_norm(weights: Mapping[str, Array], norm: str, readers: Sequence[tuple[str, str]]) -> None:
    """Moves a norm's weight and bias into the matrices that read it, and centres those, in place."""
    for matrix, bias in readers:
        if bias not in weights:
            raise ExportError(f"fold_ln needs {bias!r}, which this model does not have.")
        weights[bias][...] += weights[f"{norm}.b"] @ weights[matrix]
        weights[matrix][...] *= weights[f"{norm}.w"][:, None]
        _centre(weights[matrix], -2)


def _refactor(weights: Mapping[str, Array]) -> None:
    """Rewrites each head's W_Q W_K^T and W_V W_O by their singular value decompositions, in place."""
    rank = weights["attn.W_Q"].shape[-1]
    queries, keys = (
        np.concatenate([weights[f"attn.W_{letter}"], weights[f"attn.b_{letter}"][:, None, :]], 1).astype(np.float64)
        for letter in "QK"
    )
    left, scale, right = _svd_of_product(queries, keys)
    root = np.sqrt(scale[:, None, :rank])
    for letter, factor in (("Q", left[..., :rank] * root), ("K", right[..., :rank] * root)):
        weights[f"attn.W_{letter}"][...] = factor[:, :-1]
        weights[f"attn.b_{letter}"][...] = factor[:, -1]
    outputs = weights["attn.W_O"].transpose(0, 2, 1).astype(np.float64)
    left, scale, right = _svd_of_product(weights["attn.W_V"].astype(np.float64), outputs)
    weights["attn.W_V"][...] = left[..., :rank] * scale[:, None, :rank]
    weights["attn.W_O"][...] = right[..., :rank].transpose(0, 2, 1)


def _svd_of_product(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """The singular vectors and values of a b^T, from the small matrices that are left when a and b are made
    orthogonal: left [h, m, r], scale [h, r], right [h, n, r]."""
    (a_basis, a_core), (b_basis, b_core) = np.linalg.qr(a), np.linalg.qr(b)
    left, scale, right = np.linalg.svd(a_core @ b_core.transpose(0, 2, 1), full_matrices=False)
    return a_basis @ left, scale, b_basis @ right.transpose(0, 2, 1)
