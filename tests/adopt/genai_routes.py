"""Files of onnxruntime-genai's model builder: GroupQueryAttention with packed projections, in float32 and int4."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx

FAMILIES = ("llama", "qwen3", "gemma2")  # those of ours that the builder knows
PRECISIONS = ("fp32", "int4")


def build(checkpoint: Path, target: Path, precision: str, *options: str) -> None:
    """Writes the builder's file of a checkpoint, its external data taken in.

    Raises:
        RuntimeError: The builder failed; its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", folder]
        command += ["-p", precision, "-e", "cpu", "-c", f"{folder}/cache"]
        if options:
            command += ["--extra_options", *options]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the genai builder failed: {done.stderr.strip().splitlines()[-1]}")
        onnx.save(onnx.load(Path(folder) / "model.onnx"), target)
