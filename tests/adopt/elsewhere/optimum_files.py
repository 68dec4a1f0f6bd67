"""Exports checkpoints with optimum-onnx; run by the Python of optimum's own environment, and importing nothing of ours.

``python optimum_files.py CHECKPOINT FOLDER NAME [LEVEL]``: writes NAME.optimum.onnx, NAME.optimum-past.onnx (for a decoder),
and, where LEVEL is given (O2, O3), NAME.optimum-O2.onnx and so on.
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


def main() -> int:
    from optimum.exporters.onnx import main_export

    checkpoint, folder, name, *levels = sys.argv[1:]
    architecture = json.loads((Path(checkpoint) / "config.json").read_text("utf-8"))["architectures"][0]
    written = ("text-generation", "text-generation-with-past")
    tasks = {"CausalLM": written, "LMHead": written, "MaskedLM": ("fill-mask",)}
    kind = next((each for each in tasks if each in architecture), "")
    failed = 0
    for task in tasks.get(kind, ("image-classification",)):
        route = "optimum-past" if task.endswith("past") else "optimum"
        for level in (None, *levels):
            target = Path(folder) / f"{name}.{route}{f'-{level}' if level else ''}.onnx"
            if target.exists():
                continue
            with tempfile.TemporaryDirectory() as made:
                try:
                    main_export(checkpoint, made, task=task, optimize=level, device="cpu", do_validation=False)
                    moved(Path(made) / "model.onnx", target)
                except Exception as error:  # each file has its line
                    failed += 1
                    print(f"{target.name}: {type(error).__name__}: {error}", file=sys.stderr)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
