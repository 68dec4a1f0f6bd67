"""Files that other programs exported: which graph file is meant, and reading it, any operator allowed, before it is run."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import onnx_ir as ir

from graphlens.errors import InputError, ModelFileError
from graphlens.file.folder import MODEL_FILE, model_path, user_path
from graphlens.surgery.files import read_model
from graphlens.surgery.untrusted import CheckReport, check_graph

_SHOWN = 6  # files of a folder that an error names


def foreign_path(path: str | os.PathLike[str]) -> Path:
    """The graph file that a user means, whoever wrote it.

    Args:
        path: An ONNX file; or a folder with a ``model.onnx``, or with one ONNX file, itself or in its ``onnx`` folder.

    Returns:
        The graph file.

    Raises:
        ModelFileError: There is none, or a folder has several and none is ``model.onnx``.
    """
    given = user_path(path)
    if not given.is_dir():
        if not os.path.lexists(given):
            raise ModelFileError(f"{given}: no such file. Name an ONNX file, or a folder with one.")
        return model_path(given)
    for folder in (given, given / "onnx"):  # optimum's layout, and that of transformers.js
        found = sorted(folder.glob("*.onnx")) if folder.is_dir() else []
        names = [file.name for file in found]
        if MODEL_FILE in names:
            return model_path(folder / MODEL_FILE)
        if len(found) == 1:
            return model_path(found[0])
        if found:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise ModelFileError(
                f"{folder}: {len(found)} ONNX files lie in it ({', '.join(names[:_SHOWN])}{more}). Name one of them."
            )
    raise ModelFileError(f"{given}: no ONNX file lies in this folder. Name an ONNX file, or a folder with one.")


def load_foreign(path: str | os.PathLike[str]) -> ir.Model:
    """Reads an ONNX file that any program wrote, for surgery: its weights stay where they lie, and nothing is run.

    Also those in the file itself: however large it is, only what it says besides them is read.

    Args:
        path: See ``foreign_path``.

    Returns:
        The model. Any operator may be in it.

    Raises:
        ModelFileError: There is no such file, it is no ONNX model or damaged, or it fails a check: external data that are
            missing, too short or outside of its folder, too many nodes, functions that explode when they are inlined.
    """
    model, file = read_foreign(path, light=True)
    check_foreign(model, file)
    return model


def read_foreign(path: str | os.PathLike[str], light: bool = False) -> tuple[ir.Model, Path]:
    """Reads an ONNX file that any program wrote, without looking for its weights.

    Args:
        path: See ``foreign_path``.
        light: True leaves the large tensors of the file where they are, and tells them as external data in it.

    Returns:
        The model, and the path of its graph file.

    Raises:
        ModelFileError: It is no ONNX model, or too large to be read.
    """
    file = foreign_path(path)
    if file.stat().st_size == 0:
        raise ModelFileError(f"{file}: the file is empty. Download or export it again.")
    model, file, _ = read_model(file, verify=False, light=light)
    if len(model.graph) == 0 and not model.graph.outputs:
        raise ModelFileError(f"{file}: not an ONNX model, or an empty one: it has no nodes and no outputs.")
    _put_in_order(model.graph)
    return model, file


def _put_in_order(graph: ir.Graph) -> None:
    """Sorts a graph whose nodes are in an order in which they cannot run: ONNX Runtime sorts them, and some tools rely on it.

    ONNX Runtime's float16 converter puts the conversion of an image last, say. A graph that has no such order is refused later.
    """
    made = {value for node in graph for value in node.outputs}
    for node in graph:
        if any(value in made for value in node.inputs):
            with contextlib.suppress(ValueError):  # a cycle
                graph.sort()
            return
        made.difference_update(node.outputs)


def check_foreign(model: ir.Model, file: Path) -> CheckReport:
    """Makes sure that a model which is to be looked at is whole and has bounds. Any operator may be in it.

    Args:
        model: The model.
        file: Its graph file.

    Returns:
        What the check saw.

    Raises:
        ModelFileError: See ``load_foreign``.
    """
    return check_graph(model, file, kind=None)


def refuse_original(file: Path, target: Path) -> None:
    """Makes sure that what is written does not replace what it is made of.

    Args:
        file: The graph file that was read.
        target: The graph file to write.

    Raises:
        InputError: They are one file.
    """
    if target.exists() and target.samefile(file):
        raise InputError(f"{target}: this is the original, which stays as it is. Name another file or folder with -o.")
