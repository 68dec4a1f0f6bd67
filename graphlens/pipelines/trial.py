"""Trying a file out: opened and run once in a process of its own, which may take so much memory and time and no more.

The checks of a file say what is in it. What ONNX Runtime and the tokenizers package do with that shows only there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from graphlens.errors import GraphlensError, ModelFileError
from graphlens.file.folder import model_path
from graphlens.file.io_names import ATTENTION_MASK
from graphlens.file.tokenizer import load_tokenizer
from graphlens.pipelines.limited import ended_by, limit, run_child
from graphlens.runtime.sessions import open_session

SECONDS = 120.0
MEMORY, PER_WEIGHT_BYTE = 2 << 30, 4  # bytes: so many, and for each byte of the weights so many more
_TEXT = "When John and Mary went to the store, John gave 3 drinks to Mary. " * 8
STARTING = 30.0  # seconds that a slow machine takes to import what a run needs


@dataclass(frozen=True)
class Trial:
    """What a trial run took.

    Attributes:
        outputs: How many values the graph gave.
        open_seconds: How long opening it in ONNX Runtime took.
        run_seconds: How long the run took.
        tokens: How many tokens a sample text has; None for a folder without tokenizer files.
        memory_limit: The bytes of memory that it might have, or None where this system has no such limit.
    """

    outputs: int
    open_seconds: float
    run_seconds: float
    tokens: int | None
    memory_limit: int | None


def try_out(path: Path, weights: int, memory: int | None = None, seconds: float = SECONDS) -> Trial:
    """Opens a file in ONNX Runtime on the CPU and runs it once on a short prompt, in a child process with limits.

    Args:
        path: A hooked folder or its graph file, which has passed the checks.
        weights: The bytes of its weights.
        memory: The bytes of memory that the process may have; None allows what the weights need, and two gigabytes.
        seconds: How long it may take.

    Returns:
        What it took.

    Raises:
        ModelFileError: It ran out of memory or time, crashed, or ended with an error.
    """
    most = MEMORY + PER_WEIGHT_BYTE * weights if memory is None else memory
    within = f"(allowed: {most:,} bytes of memory, {seconds:g} s)"
    try:
        done = run_child(__name__, [str(path), str(most), str(seconds)], seconds + STARTING)
    except subprocess.TimeoutExpired as error:
        raise ModelFileError(f"{path}: the trial run did not end in time {within}. Do not open this file.") from error
    if done.returncode == 0:
        return Trial(**json.loads(done.stdout.splitlines()[-1]))
    if done.returncode == 1:
        said = done.stderr.strip().splitlines() or ["nothing was said of why"]
        raise ModelFileError(f"{path}: the trial run failed {within}: {said[-1]}")
    raise ModelFileError(
        f"{path}: the trial run crashed with {ended_by(done)} {within}. Do not open this file. {done.stderr.strip()[-500:]}"
    )


def _run(path: Path, memory: int, seconds: float) -> Trial:
    """The trial itself, in this process."""
    from graphlens import surgery
    from graphlens.surgery.sizes import short_shape

    limited = limit(memory, seconds)
    file = model_path(path)
    model = surgery.load(file)
    feeds = {}
    for value in model.graph.inputs:
        if value.name in model.graph.initializers or value.name is None or value.dtype is None:
            continue
        fill = np.ones if value.name == ATTENTION_MASK else np.zeros
        feeds[value.name] = fill(short_shape(value), value.dtype.numpy())
    started = time.perf_counter()
    session = open_session(file, "cpu")
    opened = time.perf_counter()
    outputs = session.run(session.outputs, feeds)
    ran = time.perf_counter()
    tokenizer = load_tokenizer(file.parent)
    tokens = None if tokenizer is None else tokenizer.encode(_TEXT, add_special_tokens=False)
    if tokenizer is not None and tokens is not None:
        tokenizer.decode(tokens)
    return Trial(
        len(outputs),
        opened - started,
        ran - opened,
        None if tokens is None else len(tokens),
        memory if limited else None,
    )


def main(path: str, memory: str, seconds: str) -> int:
    """The child process: prints what the trial took, or the error; returns the exit code.

    Args:
        path: The file or folder.
        memory: See ``try_out``.
        seconds: See there.
    """
    try:
        trial = _run(Path(path), int(memory), float(seconds))
    except GraphlensError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(asdict(trial)))
    return 0
