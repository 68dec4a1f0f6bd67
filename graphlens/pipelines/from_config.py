"""Models from a config of TransformerLens's: the graph of a config, made once and kept, and folders that bind weights to it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphlens.analysis.arrays import Array, ArrayInput
from graphlens.errors import ModelFileError, RuntimeUnavailable
from graphlens.export.families import Spec, hub_name, weight_views
from graphlens.export.families.transformer_lens import TRANSFORMER_LENS
from graphlens.file import version
from graphlens.file.folder import (
    CONFIG_FILE,
    MODEL_FILE,
    cache_root,
    new_folder,
    staged_folder,
    user_path,
    write_whole,
    writing,
)
from graphlens.file.inside import inside, read_regular
from graphlens.file.leftovers import remove_whole
from graphlens.file.manifest import Json, Manifest, ModelConfig, WeightView
from graphlens.file.manifest_format import FORMAT_VERSION
from graphlens.file.safetensors import SafetensorsFile, TensorEntry, put_view, write_safetensors
from graphlens.pipelines.adapters import installed
from graphlens.pipelines.lens_reference import lens_logits
from graphlens.pipelines.lens_state import checked_state as checked_state
from graphlens.pipelines.lens_state import random_state
from graphlens.pipelines.lens_state import read_config as read_config
from graphlens.pipelines.lens_state import state_shapes as state_shapes
from graphlens.views.progress import spinner

if TYPE_CHECKING:
    import onnx_ir as ir

# Raised whenever another graph would be made of the same config.
GRAPH_REVISION = 1
WEIGHTS_FILE = "weights.safetensors"
_NEEDED = ("torch", "onnxscript")
_SHARED = ("W_K", "W_V", "b_K", "b_V")
_FEWEST_POSITIONS, _LEAST_WIDTH = 4, 4  # below them a change at a hook point may rightly change no logit


def graph_of(settings: Mapping[str, Json], where: str = "this config") -> Path:
    """The folder with the graph of a config, in the cache; made if it is not there yet, which needs torch.

    It holds a ``model.onnx`` without its weights. The same graph serves all configs that differ in nothing that is computed.

    Args:
        settings: See ``read_config``.
        where: How an error calls it.

    Raises:
        ExportError: As ``read_config`` raises.
        VerificationError: The graph does not compute what the config asks for: a defect of graphlens.
        RuntimeUnavailable: A package that exporting needs is not installed.
    """
    spec, config = read_config(settings, where)
    facts = [GRAPH_REVISION, FORMAT_VERSION, dataclasses.asdict(_nameless(config)), _facts(spec)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=sorted).encode()).hexdigest()[:32]
    folder = cache_root() / "graphs" / f"transformer-lens-{digest}"
    if not _is_intact(folder):
        missing = [name for name in _NEEDED if not installed(name)]
        if missing:
            raise RuntimeUnavailable(
                f"{where}: a model from a config needs {', '.join(missing)}, which is not installed, to make its graph: "
                "pip install 'graphlens-onnx[export]'. A config whose graph was made before needs neither."
            )
        with spinner("Making the graph of this config (once)"), staged_folder(folder) as stage, writing(folder):
            _make_graph(settings, spec, _nameless(config), stage)
    return folder


def _nameless(config: ModelConfig) -> ModelConfig:
    """An architecture without what says nothing of the graph."""
    return dataclasses.replace(config, model_name="custom", default_prepend_bos=True)


def _facts(spec: Spec) -> dict[str, Json]:
    """What a Spec says, as JSON."""
    return {name: value for name, value in dataclasses.asdict(spec).items() if name != "own"}


def _is_intact(folder: Path) -> bool:
    """True if a folder holds a graph as it was written; one that is damaged is removed."""
    from graphlens.surgery.seal import is_sealed

    if not (folder / MODEL_FILE).is_file():
        return False
    try:
        if is_sealed(read_regular(inside(folder, MODEL_FILE)), str(folder)):
            return True
    except ModelFileError:
        pass
    remove_whole(folder)
    return False


def _make_graph(settings: Mapping[str, Json], spec: Spec, config: ModelConfig, stage: Path) -> None:
    """Traces the model of a config into ``stage``, and tries it out with random weights, which do not stay."""
    from graphlens import surgery
    from graphlens.engine.packed_weights import packed_folder
    from graphlens.export import build
    from graphlens.export.trace import trace
    from graphlens.pipelines.verify import verify_export
    from graphlens.surgery.files import write_graph
    from graphlens.surgery.graph import write_manifest
    from graphlens.surgery.inputs import attach_preamble

    model = trace(None, spec)
    build.optimise(model)
    hooks = build.name_hook_points(model, config.n_layers)
    build.tidy(model)
    places = {
        name: (WEIGHTS_FILE, name) for name, value in model.graph.initializers.items() if value.const_value is None
    }
    views = weight_views(spec, places)
    state = random_state(settings)
    path = stage / WEIGHTS_FILE
    _write_weights(path, {name: _sizes(model.graph.initializers[name]) for name in places}, views, state)
    entries = SafetensorsFile(path).entries
    build.bind_weights(model, lambda name, _: places[name], {WEIGHTS_FILE: entries}, stage)
    manifest = Manifest(
        config=config,
        hooks=hooks,
        weights=views,
        files={WEIGHTS_FILE: surgery.fingerprint(path)},
        source="custom",
        exporter={
            "graphlens": version.__version__,
            **{name: importlib.metadata.version(name) for name in (*_NEEDED, "onnx-ir")},
        },
    )
    model = attach_preamble(model, config.window_size)
    write_manifest(model, manifest)
    write_graph(surgery.expose(model, manifest.hooks), stage / MODEL_FILE)
    sure = config.n_ctx >= _FEWEST_POSITIONS and min(config.d_model, config.d_head, config.d_mlp) >= _LEAST_WIDTH
    sure = sure and config.window_size != 1  # a query that sees itself alone has no scores to change
    verify_export(stage / MODEL_FILE, lambda tokens: lens_logits(settings, state, tokens), effects=sure)
    remove_whole(packed_folder(stage / MODEL_FILE))  # of a large model's random weights
    path.unlink()


def _sizes(value: ir.Value) -> tuple[int, ...]:
    """The shape of an initializer."""
    assert value.shape is not None
    return tuple(int(str(size)) for size in value.shape)


def _write_weights(
    path: Path, shapes: Mapping[str, tuple[int, ...]], views: Mapping[str, WeightView], state: Mapping[str, Array]
) -> None:
    """Writes the tensors that a graph reads, a tensor in memory at a time.

    Args:
        path: The file.
        shapes: Tensor -> its shape.
        views: TransformerLens name -> what it is of them.
        state: TransformerLens name -> the weight; keys and values by either of their names.
    """
    held: dict[str, list[str]] = {}
    for name, view in views.items():
        held.setdefault(view.tensor, []).append(name)
    entries = {key: TensorEntry("F32", shape, 0, math.prod(shape) * 4) for key, shape in shapes.items()}

    def arrays() -> Iterator[Array]:
        for key, shape in shapes.items():
            tensor = np.zeros(shape, np.float32)
            for name in held[key]:
                put_view(tensor, views[name], state[name if name in state else _as_stored(name)])
            yield tensor

    write_safetensors(path, entries, arrays())


def _as_stored(name: str) -> str:
    """TransformerLens's name of a key's or value's weight where several heads share one."""
    prefix, _, leaf = name.rpartition(".")
    return f"{prefix}._{leaf}" if leaf in _SHARED else name


def bind(
    settings: Mapping[str, Json],
    state: Mapping[str, ArrayInput],
    out: str | os.PathLike[str],
    *,
    fill: bool = False,
    where: str = "the state dict",
) -> Path:
    """Writes a hooked folder: the graph of a config with weights of its own. Nothing is traced if the graph is cached.

    Args:
        settings: See ``read_config``. ``model_name`` and ``default_prepend_bos`` are what the folder says of itself.
        state: The weights in TransformerLens's names and shapes; its buffers are left out. See ``checked_state``.
        out: The folder, absent or empty.
        fill: See ``checked_state``.
        where: How an error calls the weights.

    Returns:
        ``out``.

    Raises:
        InputError: The weights do not fit the config.
        ExportError: The config asks for something that graphlens does not compute, or the folder cannot be written.
    """
    arrays = checked_state(settings, state, where, fill)
    folder = graph_of(settings)
    with new_folder(out) as stage:
        bind_into(settings, arrays, folder, stage, stage / MODEL_FILE)
        text = json.dumps({**settings, "model_type": TRANSFORMER_LENS.model_types[0]}, indent=2, default=str)
        write_whole(stage / CONFIG_FILE, text.encode())
    return user_path(out)


def bind_into(
    settings: Mapping[str, Json],
    state: Mapping[str, Array],
    folder: Path,
    stage: Path,
    graph: Path,
    n_ctx: int | None = None,
    source: tuple[str, str | None] = ("custom", None),
) -> None:
    """Writes the graph of a config and its weights into a folder.

    Args:
        settings: See ``read_config``.
        state: What ``checked_state`` gives.
        folder: What ``graph_of`` gives.
        stage: The folder to write into.
        graph: The path of the graph in it.
        n_ctx: The most tokens that a run takes when the folder is opened; None for what the config says.
        source: The name of the model, and the hub's commit.
    """
    from graphlens import surgery
    from graphlens.file.stored import bind as bind_initializer
    from graphlens.file.stored import in_files
    from graphlens.surgery.files import write_graph
    from graphlens.surgery.graph import read_manifest, write_manifest

    model = surgery.load(folder, verify=False)  # its weights are not there
    manifest = read_manifest(model)
    shapes = {str(value.name): _sizes(value) for value, _ in in_files(model)}
    path = stage / WEIGHTS_FILE
    _write_weights(path, shapes, manifest.weights, state)
    entries = SafetensorsFile(path).entries
    for value, _ in in_files(model):
        bind_initializer(value, path, entries[str(value.name)])
    config = TRANSFORMER_LENS.model_config(read_config(settings)[0], "", "float32", n_ctx or manifest.config.n_ctx)
    named = read_config(settings)[1]
    config = dataclasses.replace(
        manifest.config,
        model_name=named.model_name
        if source[0] == "custom"
        else (hub_name(source[0]).rpartition("/")[2] if source[1] else source[0]),
        default_prepend_bos=named.default_prepend_bos,
        n_ctx=config.n_ctx,
        n_ctx_trained=config.n_ctx_trained,
    )
    files = {path.name: surgery.fingerprint(path)}
    write_manifest(
        model, dataclasses.replace(manifest, config=config, files=files, source=source[0], revision=source[1])
    )
    write_graph(model, graph)
