"""``python -m tests.families --all``: every variant beside its oracles, a line for each, then every area's tests on it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from graphlens.errors import GraphlensError
from tests.families.comparing import TOLERANCE
from tests.families.encoders import ENCODERS
from tests.families.page import HEAD, Measured, measure, measure_encoder, page
from tests.families.variants import CHOSEN, VARIANTS

ROOT = Path(__file__).resolve().parents[2]


def _made_by() -> str:
    """The versions that figures were measured with."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    packages = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "onnxruntime"))
    return f"with {packages}" + (f", at commit {commit}" if commit else "")


def _areas(names: list[str], exports: Path) -> int:
    """Runs the tests of every area on variants that are exported already; returns pytest's status."""
    environment = os.environ | {"GRAPHLENS_FAMILIES": ",".join(names), "GRAPHLENS_FAMILIES_ROOT": str(exports)}
    command = [sys.executable, "-m", "pytest", "tests/families", "-p", "no:cacheprovider", "-n", "2"]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="variant", help="default: those that the tests take at this commit")
    parser.add_argument("--all", action="store_true", help="every variant")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the page about all of them; needs --all")
    parser.add_argument("--matrix-only", action="store_true", help="leave out the tests of the areas")
    parser.add_argument("--exports", type=Path, help="a folder to keep the exports in, and take them from")
    asked = parser.parse_args()
    unknown = set(asked.names) - {*VARIANTS, *ENCODERS}
    if unknown:
        parser.error(f"no such variant: {', '.join(sorted(unknown))}. There are: {', '.join([*VARIANTS, *ENCODERS])}.")
    if asked.table and not asked.all:
        parser.error("--table needs --all: the page is about every variant.")
    import torch

    torch.set_num_threads(1)
    names = [*VARIANTS, *ENCODERS] if asked.all else asked.names or list(CHOSEN)
    found: list[Measured] = []
    failures: list[str] = []
    print(f"{HEAD} seconds |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as made:
        exports = asked.exports or Path(made)
        exports.mkdir(parents=True, exist_ok=True)
        for name in names:
            try:
                measured = measure_encoder(name, exports) if name in ENCODERS else measure(name, exports)
            except (AssertionError, GraphlensError) as error:  # each variant has its line
                failures.append(f"{name}: {type(error).__name__}: {error}")
                print(f"| {name} | failed |", flush=True)
                continue
            found.append(measured)
            print(f"{measured.row()} {measured.seconds:.0f} |", flush=True)
            if not measured.worst.share <= TOLERANCE:
                failures.append(f"{name}: {measured.worst.what} differs by {measured.worst.share:.1e}")
        if asked.table and not failures:
            asked.table.write_text(page(found, _made_by()), encoding="utf-8")
        # The encoders' own tests take them all.
        status = 0 if asked.matrix_only else _areas([name for name in names if name in VARIANTS], exports)
    print("\n".join(failures) or "No failure in the matrix.")
    sys.exit(bool(failures) or status)


if __name__ == "__main__":
    main()
