"""Exports a checkpoint with optimum-onnx; run by the Python of optimum's own environment, and importing nothing of ours.

``python optimum_files.py CHECKPOINT FOLDER NAME ROUTE...``: writes NAME.ROUTE.onnx for each ROUTE: optimum, optimum-past (for a
decoder), and either with -O2 or -O3 behind it, or with -int8, as ``optimum-cli onnxruntime quantize --avx512_vnni --per_channel``
makes it.
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


def quantised(made: Path) -> Path:
    """The file that optimum's quantiser makes of one."""
    from optimum.onnxruntime import AutoQuantizationConfig, ORTQuantizer

    config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    quantizer = ORTQuantizer.from_pretrained(made.parent, file_name=made.name)
    quantizer.quantize(config, save_dir=made.parent / "int8")
    return made.parent / "int8" / f"{made.stem}_quantized.onnx"


def main() -> None:
    from optimum.exporters.onnx import main_export

    checkpoint, folder, name, *routes = sys.argv[1:]
    architecture = json.loads((Path(checkpoint) / "config.json").read_text("utf-8"))["architectures"][0]
    tasks = {"CausalLM": "text-generation", "LMHead": "text-generation", "MaskedLM": "fill-mask"}
    task = next((tasks[each] for each in tasks if each in architecture), "image-classification")
    for route in routes:
        kind, _, level = route.removesuffix("-int8").partition("-O")
        asked = f"{task}-with-past" if kind == "optimum-past" else task
        options = {"optimize": f"O{level}"} if level else {}
        with tempfile.TemporaryDirectory() as made:
            main_export(checkpoint, made, task=asked, device="cpu", do_validation=False, **options)
            file = Path(made) / "model.onnx"
            moved(quantised(file) if route.endswith("-int8") else file, Path(folder) / f"{name}.{route}.onnx")


if __name__ == "__main__":
    main()
