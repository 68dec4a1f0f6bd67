"""Weights of a hooked graph that get another content: which initializer holds which, and a folder that holds the new ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
from onnx_ir.tape import Tape

from graphlens.errors import InputError
from graphlens.file.copies import place
from graphlens.file.folder import MODEL_FILE, copy_settings
from graphlens.file.manifest import Manifest
from graphlens.file.safetensors import Array, SafetensorsFile, TensorEntry, write_safetensors
from graphlens.file.stored import DATA_TYPES, StoredWeights, bind
from graphlens.surgery.files import weights_files, write_graph
from graphlens.surgery.fingerprint import fingerprint
from graphlens.surgery.graph import finish, install, let_read, named, read_manifest

_FILE = "replaced{}.safetensors"  # what a folder holds new weights in
_OWN = "unembed.weight"  # the unembedding's initializer once it is no more the embedding's


def initializers_of_weights(model: ir.Model, manifest: Manifest) -> dict[str, str]:
    """The initializer that each weight is a view of.

    Args:
        model: A hooked model.
        manifest: Its manifest.

    Returns:
        TransformerLens name -> the initializer's name. Weights that share a tensor share an initializer; those that an
        adopted file stores as integers are left out.
    """
    stored = StoredWeights(model, manifest)
    return {name: str(stored.initializer(name).name) for name in stored.views}


def untied(model: ir.Model, shared: str) -> tuple[ir.Model, str]:
    """A copy in which the unembedding reads an initializer of its own, with the content that it shared with the embedding.

    Args:
        model: A hooked model whose embedding and unembedding are one initializer.
        shared: That initializer's name.

    Returns:
        (the copy, the name of the unembedding's initializer).

    Raises:
        InputError: The graph looks tokens up in another way than by a Gather, so that the two cannot be told apart.
    """
    model = model.clone()
    graph = model.graph
    old = graph.initializers[shared]
    own = ir.Value(name=_OWN, shape=old.shape, type=old.type, const_value=old.const_value)
    graph.initializers[_OWN] = own
    casts = [node for node, _ in old.uses() if node.op_type == "Cast"]  # bfloat16 is cast before it is computed with
    for source, new in ((old, own), *((node.outputs[0], None) for node in casts)):
        readers = [(node, index) for node, index in source.uses() if node.op_type not in ("Gather", "Cast")]
        if new is None and readers:
            tape = Tape()
            new = tape.op("Cast", [own], {"to": int(source.dtype or ir.DataType.FLOAT)})
            new.name = f"{_OWN}/cast"
            install(graph, tape, named(f"{_OWN}/cast"), after=own)
        if new is not None:
            let_read(readers, new, source)
    if not own.uses() or not old.uses():
        raise InputError(
            "embed.W_E and unembed.W_U are one tensor in this file, and its graph does not tell them apart: set both to "
            "the same numbers."
        )
    return model, _OWN


def write_replaced(
    model: ir.Model, places: Mapping[str, str], contents: Mapping[str, Array], source: Path, stage: Path
) -> None:
    """Writes a hooked folder in which some weights have another content.

    Args:
        model: The hooked model.
        places: TransformerLens name -> the initializer that the weight is a view of.
        contents: Initializer -> its new content, with the shape and the dtype that it is stored in; bfloat16 as uint16
            words. It goes into a file of its own; the others stay in the files that they are in.
        source: The folder of the model's file.
        stage: The folder to write into.
    """
    model = model.clone()
    graph, manifest = model.graph, read_manifest(model)
    kinds = {kind: name for name, kind in DATA_TYPES.items()}
    entries = {
        name: TensorEntry(kinds[_dtype(graph.initializers[name])], array.shape, 0, array.nbytes)
        for name, array in contents.items()
    }
    # The model may have been written by this function before.
    numbers = ("", *(f"-{number}" for number in range(2, len(manifest.files) + 3)))
    path = stage / next(name for name in map(_FILE.format, numbers) if name not in manifest.files)
    write_safetensors(path, entries, contents.values())
    for name, entry in SafetensorsFile(path).entries.items():
        bind(graph.initializers[name], path, entry)
    views = {
        name: replace(view, file=path.name, tensor=places[name]) if places[name] in contents else view
        for name, view in manifest.weights.items()
    }
    copy_settings(source, stage)
    place({name: old for name, old in weights_files(model).items() if name != path.name}, stage, link=True)
    files = {name: known for name, known in manifest.files.items() if (stage / name).exists()}
    done = replace(manifest, weights=views, files={**files, path.name: fingerprint(path)})
    write_graph(finish(model, done, "the graph with other weights"), stage / MODEL_FILE)


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None, "an initializer has a dtype"
    return value.dtype
