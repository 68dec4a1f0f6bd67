"""Which execution provider ran each node of a graph, from ONNX Runtime's own profile of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# What computes with activations. Shapes and indices ONNX Runtime puts on the CPU on purpose, next to where they are needed.
HEAVY = frozenset({
    "Gemm", "MatMul", "FusedMatMul", "Softmax", "Gelu", "FastGelu", "BiasGelu", "QuickGelu", "Tanh", "Sigmoid", "Erf",
    "ReduceMean", "ReduceSum", "LayerNormalization", "SkipLayerNormalization", "SimplifiedLayerNormalization",
})  # fmt: skip


def placed(
    model: Path, feeds: Mapping[str, npt.NDArray[Any]], providers: Iterable[Any], folder: Path
) -> dict[str, set[str]]:
    """Operator -> the providers that ran nodes of it, in one run of all outputs.

    Args:
        model: A graph file.
        feeds: The inputs of the run.
        providers: What the session is asked for.
        folder: Where the profile is written.
    """
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session = onnxruntime.InferenceSession(str(model), options, providers=list(providers))
    session.run(None, dict(feeds))
    found: dict[str, set[str]] = {}
    for event in json.loads(Path(session.end_profiling()).read_text()):
        said = event.get("args", {})
        if event.get("cat") == "Node" and "provider" in said and "op_name" in said:
            found.setdefault(said["op_name"], set()).add(said["provider"])
    return found


def fallen(found: Mapping[str, set[str]]) -> list[str]:
    """The operators that compute with activations and ran on the CPU.

    Args:
        found: What ``placed`` gives.
    """
    return sorted(name for name, providers in found.items() if name in HEAVY and CPU in providers)


def tokens_of(vocabulary: int, batch: int, length: int) -> npt.NDArray[np.int64]:
    """Seeded random tokens [batch, length]."""
    return np.random.default_rng(0).integers(0, vocabulary, (batch, length))
