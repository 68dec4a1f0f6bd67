"""``python -m tests.saes --all``: SAEs of every layout and architecture against sae-lens's and sparsify's own, each way."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np

from graphlens import Sae
from tests.saes import scores_check, splicing_check
from tests.saes.oracle_check import TOLERANCE, all_values, compared, farthest
from tools.bench.environments import TORCH, Environment

SAELENS = Environment("sae-lens-6.54", ("sae-lens==6.54.*", "transformer-lens==3.9.0", "eai-sparsify==1.3.*", TORCH))
WORKER = Path(__file__).with_name("sae_oracle.py")
HEAD = """| SAE | values of | arrays | largest error | written by graphlens, opened by SAELens |
|---|---|---|---|---|"""
PAGE = """# SAEs, compared with their own libraries

Each line is an SAE in a layout that a library writes, opened by `graphlens.Sae`. Its hook points, `encode`, `decode` and the
whole are compared with what that library makes of the same activations. An error counts in units of max(1, the largest value);
up to {tolerance:.0e} is allowed. The last column is the other way: SAELens opens what `Sae.save` wrote of it.

![The six hook points of an SAE, whose values are compared](pictures/saes.svg)

`{command}` wrote this page, with sae-lens 6.54, eai-sparsify 1.3 and Python {python} on {system}.

"""
IN_MODELS = """
## In models

Each line is an SAE in a random transformer of odd sizes, for `graphlens` and for SAELens's HookedSAETransformer on
TransformerLens 3.9: the values at its hook points, the logits, the logits with features ablated and the reconstruction
scaled, and the gradients of a logit difference at its hook points. A third of the lines leave the SAE out at two tokens. Up
to {values:.0e} is allowed, and {gradients:.0e} of the largest value for gradients. SAELens's wrapper leaves a transcoder's
skip out, so what depends on it is not compared here; it is compared with torch in `tests/saes/test_sae_splicing.py`.

"""
SCORES = """
## Scores

`graphlens.sae_scores` beside `get_downstream_reconstruction_metrics` and `get_sparsity_and_variance_metrics` of SAELens's
evaluations, on the same tokens. Up to {tolerance:.0e} of max(1, the score) is allowed, {looser:.0e} for quotients of numbers that
nearly cancel; the last column is a share of that.

"""
# SAELens has no transcoder with topk: it refuses what graphlens writes of one.
WITHOUT = "-"


def run(python: Path, *words: str, worker: Path = WORKER) -> None:
    """Runs a worker. Raises AssertionError with what it said if it failed."""
    done = subprocess.run([str(python), str(worker), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def saved(root: Path, made: Path, python: Path) -> dict[str, float]:
    """Has SAELens open what graphlens saves of every SAE: name -> largest error."""
    cases = json.loads((made / "list.json").read_text())
    kept: dict[str, tuple[Sae, Path]] = {}
    for case in cases:
        sae = Sae.from_folder(made / case["folder"], **case["asked"])
        if sae.cfg.is_transcoder and sae.cfg.k is not None:
            continue
        folder = root / case["name"]
        sae.save(folder)
        np.save(folder / "x.npy", np.load(made / case["folder"] / "values.npz")["x"])
        kept[case["name"]] = (sae, folder)
    run(python, "open", str(root))
    errors = {}
    for name, (sae, folder) in kept.items():
        with np.load(folder / "values.npz") as file:
            expected = {each: file[each] for each in file.files}
        errors[name] = farthest(all_values(sae, expected.pop("x")), expected)
    return errors


def in_their_interpreter(check: ModuleType, folder: Path, python: Path) -> tuple[list[str], int]:
    """(the lines of a table of what is compared in sae-lens's interpreter, how many of them failed).

    ``check``: ``splicing_check`` or ``scores_check``.
    """
    lines, failures = [check.HEAD], 0
    folder.mkdir()
    print(lines[0], flush=True)
    for each in check.compared(folder, lambda place: run(python, str(place), worker=check.WORKER)):
        failures += each.fails
        lines.append(each.row())
        print(lines[-1], flush=True)
    return lines, failures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.saes", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every layout and architecture; there is no less")
    parser.add_argument("--work", type=Path, help="a folder to keep the environment in")
    parser.add_argument(
        "--saelens", type=Path, metavar="PYTHON", help="an interpreter that has sae-lens and eai-sparsify"
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table into this page")
    asked = parser.parse_args()
    lines, failures = [HEAD], 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        made, back = root / "made", root / "back"
        made.mkdir(), back.mkdir()
        python = asked.saelens or SAELENS.python(asked.work or root)
        run(python, "make", str(made))
        returned = saved(back, made, python)
        print(HEAD, flush=True)
        for each in compared(made):
            error = returned.get(each.name)
            failures += each.farthest > TOLERANCE or (error or 0) > TOLERANCE
            opened = WITHOUT if error is None else f"{error:.0e}"
            lines.append(f"| {each.name} | `{each.oracle}` | {len(each.arrays)} | {each.farthest:.0e} | {opened} |")
            print(lines[-1], flush=True)
        models, more = in_their_interpreter(splicing_check, root / "in-models", python)
        scores, wrong = in_their_interpreter(scores_check, root / "scores", python)
        failures += more + wrong
    print(f"{len(lines) + len(models) + len(scores) - 3 - failures} passed, {failures} failed")
    if asked.table:
        command = "python -m tests.saes --all --table docs/sae-tests.md"
        head = PAGE.format(
            command=command, python=platform.python_version(), system=platform.system(), tolerance=TOLERANCE
        )
        second = IN_MODELS.format(values=splicing_check.VALUES, gradients=splicing_check.GRADIENTS)
        whole = (
            head
            + "\n".join(lines)
            + "\n"
            + second
            + "\n".join(models)
            + "\n"
            + SCORES.format(tolerance=scores_check.TOLERANCE, looser=scores_check.LOOSER)
            + "\n".join(scores)
            + "\n"
        )
        asked.table.write_text(whole, encoding="utf-8")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
