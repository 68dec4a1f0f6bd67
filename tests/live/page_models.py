"""What the tests of live pages share: stand-ins for the npm packages, and a page's graph run by plain ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from graphlens.edits import gate
from graphlens.file.manifest import Manifest
from graphlens.file.names import axis_sizes
from graphlens.interventions import Intervention, to_json
from graphlens.pipelines.page_runtime import PACKAGES
from graphlens.surgery.page_graph import PageGraph

Array = npt.NDArray[np.generic]
# In place of the npm packages, where a page is only written: their real files are 14 MB and come from a network.
PROGRAMS = {
    (package.name, path): f"// {package.name}/{path}\n".encode() for package in PACKAGES for path in package.files
}


def inline(edits: Iterable[Intervention]) -> str:
    """Edits as the page writes them: arrays inside the JSON."""
    text, tensors = to_json(edits)
    data = json.loads(text)
    for record in data["interventions"]:
        for field, value in record.items():
            if isinstance(value, dict) and "tensor" in value:
                record[field] = tensors[value["tensor"]].tolist()
    return json.dumps(data)


def neutral(graph: PageGraph) -> dict[str, Array]:
    """What every gate is fed where nothing is edited."""
    found: dict[str, Array] = {}
    for value in graph.model.graph.inputs:
        name, part = str(value.name).rpartition("/")[::2]
        if name in graph.gates:
            dtype = np.bool_ if part == "where" else np.float32
            found[str(value.name)] = np.full([1] * len(value.shape or ()), part == "scale", dtype)
    return found


def run(
    graph: PageGraph,
    folder: Path,
    ids: Sequence[int],
    edits: Mapping[str, Sequence[Intervention]] | None = None,
    manifest: Manifest | None = None,
    at: Sequence[int] | None = None,
) -> dict[str, npt.NDArray[np.float32]]:
    """Every output of a page's graph, by its name, for one prompt.

    Args:
        graph: The graph.
        folder: Where its weights lie.
        ids: The prompt.
        edits: Interventions by hook point. The arrays of their gates are Python's own (``gate.compose``).
        manifest: The model's, where there are edits.
        at: The lens's positions; all by default.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = onnxruntime.InferenceSession(
        ir.to_proto(graph.model).SerializeToString(), options, ["CPUExecutionProvider"]
    )
    feeds = {**neutral(graph), "input_ids": np.asarray([ids], np.int64)}
    if graph.lens is not None:
        feeds["lens/positions"] = np.asarray(range(len(ids)) if at is None else at, np.int64)
    for hook, items in (edits or {}).items():
        assert manifest is not None
        entry, window = manifest.hooks[hook], gate.Window.whole(1, len(ids))
        for part, array in gate.compose(items, entry, axis_sizes(manifest.config), window).items():
            feeds[f"{hook}/{part}"] = array
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))
