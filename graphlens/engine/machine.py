"""What of this machine decides the bits that a run gives: its processor, its cores, and the packages that compute."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from pathlib import Path

import numpy as np

from graphlens.file.version import __version__
from graphlens.runtime import threads
from graphlens.runtime.sessions import version


def processor() -> str:
    """The processor's model and features, which decide which kernels run and how weights are packed for them."""
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.split("\t")[0].strip() in wanted}))
    return platform.processor()


def cores() -> int:
    """The cores that a run may use: ONNX Runtime splits a matrix product into as many parts."""
    return threads.limited() or threads.cores()


def limit_threads(count: int) -> None:
    """Has the models that this process opens from now on compute with so many threads.

    Args:
        count: How many; 0 for ONNX Runtime's own choice, the machine's cores.
    """
    threads.limit(count)


def computing() -> dict[str, str | int]:
    """What runs of equal sessions over equal inputs need in common to give equal bits.

    Returns:
        Versions of packages, the kind of machine, a digest of the processor's model and features, and the cores.
    """
    return {
        "graphlens": __version__,
        "onnxruntime": version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "processor": hashlib.sha256(processor().encode()).hexdigest()[:16],
        "cores": cores(),
    }
