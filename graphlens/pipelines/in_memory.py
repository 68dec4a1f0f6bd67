"""A transformers model in memory as a checkpoint folder, for the time of an export."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from graphlens.errors import ExportError, InputError
from graphlens.export.families import families
from graphlens.file.folder import CONFIG_FILE, TOKENIZER_FILES
from graphlens.file.inside import inside
from graphlens.pipelines.adapters import installed
from graphlens.pipelines.hub import Source, resolve
from graphlens.pipelines.placing import DTYPE


class TorchTensor(Protocol):
    """What is asked of a parameter of a transformers model."""

    dtype: object

    def element_size(self) -> int:
        """Bytes of an element."""


class TransformersModel(Protocol):
    """What is asked of a transformers model in memory."""

    def save_pretrained(self, folder: str | os.PathLike[str], /) -> object:
        """Writes the model as a checkpoint folder."""

    def named_parameters(self) -> Iterable[tuple[str, TorchTensor]]:
        """The model's parameters by name."""

    def state_dict(self) -> Mapping[str, object]:
        """What the model's state is made of, by name."""


@contextlib.contextmanager
def saved(hf_model: TransformersModel, name: str) -> Iterator[Source]:
    """A transformers model written to a temporary folder, with the tokenizer files of the named model beside it.

    A model whose class is derived from a family's is written as one of that family's class.

    Args:
        hf_model: The model.
        name: What it is called.

    Yields:
        Where it is, until the block ends.

    Raises:
        InputError: It is no transformers model, is quantised or too precise, or computes something else than its family.
    """
    if not hasattr(hf_model, "save_pretrained"):
        raise InputError(f"hf_model must be a transformers model, not {type(hf_model).__name__}.")
    quantised = _quantised(hf_model)
    if quantised is not None:
        raise InputError(
            f"hf_model is quantised ({quantised}), and graphlens exports float weights: pass the model before it was "
            "quantised, or hf_model.dequantize()."
        )
    for parameter, tensor in hf_model.named_parameters():
        if tensor.element_size() > np.dtype(DTYPE).itemsize:
            raise InputError(
                f"hf_model's {parameter} is {tensor.dtype}, which {DTYPE} would round, and every model is exported from "
                f"{DTYPE}: pass hf_model.float(), and dtype= for the precision to compute in."
            )
    with tempfile.TemporaryDirectory() as written:
        folder = Path(written)
        hf_model.save_pretrained(folder)
        _name_its_family(hf_model, folder)
        if (folder / CONFIG_FILE).is_file() and installed("torch"):
            from graphlens.pipelines.verify import ensure_computes_as_its_class

            ensure_computes_as_its_class(hf_model, folder)
        # Where nothing has that name it is only a label: the weights are here. Tokenizer files are then left out.
        with contextlib.suppress(ExportError):
            named = resolve(name).folder
            for file in TOKENIZER_FILES:
                if (named / file).is_file():
                    shutil.copyfile(inside(named, file), folder / file)
        yield Source(Path(name).name, folder)


def _quantised(hf_model: TransformersModel) -> str | None:
    """What shows that a model's weights are quantised; None for plain ones."""
    method = getattr(hf_model, "quantization_method", None) or getattr(
        getattr(hf_model, "config", None), "quantization_config", None
    )
    if method is not None or getattr(hf_model, "is_quantized", False):
        return f"by {getattr(method, 'value', None) or getattr(method, 'quant_method', None) or type(method).__name__}"
    for name, tensor in hf_model.state_dict().items():
        dtype = getattr(tensor, "dtype", None)  # torch's own quantised modules keep packed weights and dtypes there
        if dtype is None or getattr(tensor, "is_quantized", False):
            return f"{name} is a {type(tensor).__name__ if dtype is None else dtype}"
    for name, tensor in hf_model.named_parameters():
        if "float" not in str(tensor.dtype):
            return f"{name} is {tensor.dtype}"
    return None


def _name_its_family(hf_model: TransformersModel, folder: Path) -> None:
    """Puts the class of its family into config.json, where the model's own class is derived from that one."""
    known = {family.architecture for family in families()}
    named = next((kind.__name__ for kind in type(hf_model).__mro__ if kind.__name__ in known), None)
    path = folder / CONFIG_FILE
    if named is None or named == type(hf_model).__name__ or not path.is_file():
        return
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [named]}, indent=2))
