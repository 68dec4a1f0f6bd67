"""What the tests of refused files share: a folder's graph file changed, and the error that every way of opening it gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from graphlens import HookedTransformer, surgery
from graphlens.errors import ModelFileError
from graphlens.surgery.seal import sealed_bytes

Change = Callable[[onnx.ModelProto], Any]
MODEL, WEIGHTS = "model.onnx", "model.safetensors"


def rewrite(folder: Path, change: Change) -> Path:
    """Changes the graph file of a folder, and seals it as one that was written so; returns the folder."""
    proto = onnx.load(folder / MODEL, load_external_data=False)
    change(proto)
    (folder / MODEL).write_bytes(sealed_bytes(proto))
    return folder


def refused(path: Path, *says: str, of: str = "") -> str:
    """The message of the error that opening gives, by every door; it holds ``says`` and the path of the file ``of``."""
    messages = set()
    for opening in (HookedTransformer.from_onnx, surgery.load, surgery.check):
        with pytest.raises(ModelFileError) as caught:
            opening(path)
        messages.add(str(caught.value))
    assert len(messages) == 1
    (message,) = messages
    folder = path if path.suffix != ".onnx" else path.parent
    for part in (*says, str(folder / of) if of else str(folder)):
        assert part in message
    return message
