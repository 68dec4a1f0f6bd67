"""Small files of tools that CI does not have, committed beside this: what made them, and where they are.

``GRAPHLENS_OPTIMUM_PYTHON=.../bin/python python -m tests.adopt.fixtures`` makes those that are missing, with
``--all`` behind it all of them anew.
"""

from __future__ import annotations

import gzip
import sys
import tempfile
from pathlib import Path

from tests.adopt.adopt_files import Files

FOLDER = Path(__file__).parent / "committed"
# (checkpoint, kind of file)
FIXTURES = (
    ("small-llama", "optimum-past"),
    ("small-llama", "optimum-past-O3"),
    ("small-llama", "optimum-past-int8"),
    ("small-gpt2", "optimum-past"),
    ("small-neox", "optimum-past-O2"),
    ("small-bert", "optimum-O3"),
    ("small-vit", "optimum"),
    ("small-llama", "genai-fp32"),
    ("small-llama", "genai-int4"),
    ("small-gemma2", "genai-fp32"),
    ("small-gemma2", "genai-int4"),
)


def fixture(name: str, route: str, target: Path) -> Path:
    """A committed file, unpacked as ``target``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(gzip.decompress((FOLDER / f"{name}.{route}.onnx.gz").read_bytes()))
    return target


def main() -> None:
    """Makes those that are not there, or all of them (--all)."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as root:
        files = Files(Path(root))
        for name, route in FIXTURES:
            if (FOLDER / f"{name}.{route}.onnx.gz").exists() and "--all" not in sys.argv:
                continue
            packed = gzip.compress(files.path(name, route).read_bytes(), 9, mtime=0)
            (FOLDER / f"{name}.{route}.onnx.gz").write_bytes(packed)
            print(f"{name} {route} {len(packed)}")


if __name__ == "__main__":
    main()
