"""Exports a checkpoint with optimum-onnx; run by the Python of optimum's own environment, and importing nothing of ours.

``python optimum_files.py CHECKPOINT FOLDER NAME ROUTE...``: writes NAME.ROUTE.onnx for each ROUTE: optimum, optimum-past (for a
decoder), and either with -O2 or -O3 behind it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import onnx


def moved(made: Path, target: Path) -> None:
    """Writes a made file, its external data taken in, as ``target``."""
    onnx.save(onnx.load(made), target)


def main() -> None:
    from optimum.exporters.onnx import main_export

    checkpoint, folder, name, *routes = sys.argv[1:]
    architecture = json.loads((Path(checkpoint) / "config.json").read_text("utf-8"))["architectures"][0]
    tasks = {"CausalLM": "text-generation", "LMHead": "text-generation", "MaskedLM": "fill-mask"}
    task = next((tasks[each] for each in tasks if each in architecture), "image-classification")
    for route in routes:
        kind, _, level = route.partition("-O")
        asked = f"{task}-with-past" if kind == "optimum-past" else task
        options = {"optimize": f"O{level}"} if level else {}
        with tempfile.TemporaryDirectory() as made:
            main_export(checkpoint, made, task=asked, device="cpu", do_validation=False, **options)
            moved(Path(made) / "model.onnx", Path(folder) / f"{name}.{route}.onnx")


if __name__ == "__main__":
    main()
