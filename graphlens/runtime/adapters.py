"""ONNX Runtime's adapter files (.onnx_adapter): named inputs that a run can be given by a file instead of by feeds."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from graphlens.runtime.providers import onnxruntime
from graphlens.runtime.types import Array


def write_adapter_file(inputs: Mapping[str, Array], path: str | os.PathLike[str]) -> None:
    """Writes an adapter file, which ``onnxruntime.RunOptions.add_active_adapter`` gives to a run.

    Args:
        inputs: Arrays by input name.
        path: The ``.onnx_adapter`` file to write.
    """
    ort = onnxruntime()
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    # The values alias these arrays until the file is written.
    arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()})
    adapter.export_adapter(os.fspath(path))
