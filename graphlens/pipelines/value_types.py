"""The types and ranks of a model's values where its file does not say them: ONNX Runtime is asked, in a process with limits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphlens.errors import GraphlensError, ModelFileError
from graphlens.pipelines.limited import ended_by, limit, run_child
from graphlens.runtime.sessions import Session, open_session
from graphlens.runtime.types import Array
from graphlens.surgery.foreign import read_foreign
from graphlens.surgery.outputs import with_values

Size = int | str | None
_MEMORY, _PER_WEIGHT_BYTE = 1 << 30, 4
_SECONDS, _BYTES_A_SECOND, _STARTING = 2.5, 5e7, 60.0
# What a run is fed: (each size that only a run knows, each number). With sizes of 1 everything broadcasts; a table of one
# row takes no 1, and a mask of zeros masks everything.
_TRIES = ((1, 1), (1, 0), (4, 1))


@dataclass(frozen=True)
class Found:
    """What ONNX Runtime says of a value.

    Attributes:
        type: Its type in ONNX Runtime's words: "tensor(float)", "seq(tensor(int64))".
        shape: Its sizes: numbers, names, or None for a size that is not known; None where the rank is not known.
    """

    type: str
    shape: tuple[Size, ...] | None


def ask_runtime(file: Path, names: Sequence[str], weights: int) -> dict[str, Found]:
    """What ONNX Runtime finds out about values of a model: by inference, and where that leaves ranks open by a small run.

    Args:
        file: The graph file, which has passed the checks.
        names: Names of values that nodes of the main graph compute.
        weights: The bytes of the model's weights.

    Returns:
        Name -> what was found.

    Raises:
        ModelFileError: ONNX Runtime does not open it, or not with so much memory and time.
    """
    seconds = _SECONDS + weights / _BYTES_A_SECOND
    memory = _MEMORY + _PER_WEIGHT_BYTE * weights
    try:
        done = run_child(__name__, [str(file), json.dumps(list(names)), str(memory), str(seconds)], seconds + _STARTING)
    except subprocess.TimeoutExpired as error:
        raise _refused(file, f"it did not open and run in {seconds:.0f} s") from error
    if done.returncode == 0:
        found: Mapping[str, Sequence[object]] = json.loads(done.stdout.splitlines()[-1])
        return {name: Found(str(kind), _sizes(shape)) for name, (kind, shape) in found.items()}
    if done.returncode == 1:
        raise _refused(file, (done.stderr.strip().splitlines() or ["nothing was said of why"])[-1])
    raise _refused(file, f"it crashed with {ended_by(done)}")


def _sizes(given: object) -> tuple[Size, ...] | None:
    """Sizes as JSON held them."""
    if not isinstance(given, list):
        return None
    return tuple(size if isinstance(size, int | str) else None for size in given)


def _refused(file: Path, why: str) -> ModelFileError:
    return ModelFileError(
        f"{file}: the types of its values are not in the file, and ONNX Runtime, which infers them, does not open it: {why} "
        "A file with value_info (onnx.shape_inference writes it) can be exposed without being opened."
    )


def main(file: str, names: str, memory: str, seconds: str) -> int:
    """The child process: prints what was found, or the error; returns the exit code.

    Args:
        file: The graph file.
        names: The names of the values, as JSON.
        memory: The bytes of memory that this process may have.
        seconds: How many seconds of processor time.
    """
    limit(int(memory), float(seconds))
    try:
        found = _look(Path(file), json.loads(names))
    except GraphlensError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    except MemoryError:
        print("it needs more memory than it may have.", file=sys.stderr)
        return 1
    print(json.dumps({name: (each.type, each.shape) for name, each in found.items()}))
    return 0


def _look(file: Path, names: list[str]) -> dict[str, Found]:
    """Opens the model with these values as outputs, and runs it if ranks are not known without."""
    model, _ = read_foreign(file, light=True)
    extended = with_values(model, names)
    for value in extended.graph.outputs:
        if value.name in names:
            value.type, value.shape = None, None  # what ONNX Runtime infers counts
    session = open_session(ir.to_proto(extended).SerializeToString(), "cpu", file.parent, name=str(file))
    declared = session.declared()
    found = {name: Found(declared[name][0], declared[name][1] or None) for name in names}
    if any(each.shape is None and each.type.startswith("tensor") for each in found.values()):
        for size, number in _TRIES:
            if (feeds := _feeds(model, size, number)) is not None and (ran := _ran(session, names, feeds)) is not None:
                return {name: _with_rank(found[name], ran[name]) for name in names}
    return found


def _with_rank(found: Found, sizes: tuple[int, ...] | None) -> Found:
    """What is known of a value once a run gave it these sizes; None for what is no tensor."""
    if sizes is None:
        return found
    known = found.shape if found.shape is not None and len(found.shape) == len(sizes) else (None,) * len(sizes)
    return Found(
        found.type,
        tuple(size if size == n or isinstance(size, str) else None for size, n in zip(known, sizes, strict=True)),
    )


def _feeds(model: ir.Model, size: int, number: int) -> dict[str, Array] | None:
    """Arrays for a model's inputs; None where one is of a kind that has no array."""
    feeds = {}
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue
        if not isinstance(value.type, ir.TensorType) or value.shape is None or value.dtype is None:
            return None
        shape = tuple(each if isinstance(each, int) else size for each in value.shape)
        if min(shape, default=1) < 0 or np.prod(shape, dtype=np.float64) > 1e7:
            return None
        if value.dtype == ir.DataType.STRING:
            feeds[str(value.name)] = np.full(shape, "a", object)
        else:
            feeds[str(value.name)] = np.full(shape, number).astype(value.dtype.numpy())
    return feeds


def _ran(session: Session, names: list[str], feeds: dict[str, Array]) -> dict[str, tuple[int, ...] | None] | None:
    """The sizes that values have in a run; None where it fails."""
    try:
        values = session.run_on_device(names, feeds)
    except GraphlensError:
        return None
    return {
        name: tuple(value.shape()) if value.is_tensor() else None for name, value in zip(names, values, strict=True)
    }
