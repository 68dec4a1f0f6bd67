"""docs/adopting.md as a user of optimum plays it: every line of the page, optimum's own too, on a tiny Llama checkpoint."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

from tests.adopting_page import PAGE, play
from tests.families.worded import worded_checkpoint


class NoOptimum(Exception):  # not an error of ours
    """GRAPHLENS_OPTIMUM_PYTHON names no Python of an environment with optimum-onnx."""


def optimum_lines() -> list[list[str]]:
    """What the page asks of optimum, in order."""
    return [shlex.split(line) for line in re.findall(r"^optimum-cli .*$", PAGE.read_text("utf-8"), re.M)]


def play_all(folder: Path) -> str:
    """Runs every line of the page in a folder, and says what came of the three commands.

    Args:
        folder: An empty folder.

    Raises:
        NoOptimum: See there.
        AssertionError: A command fails, or does not say what the page promises.
    """
    python = os.environ.get("GRAPHLENS_OPTIMUM_PYTHON", "")
    program = Path(python).parent / "optimum-cli"
    if not python or not program.is_file():
        raise NoOptimum("GRAPHLENS_OPTIMUM_PYTHON names no Python with optimum-onnx")
    checkpoint = worded_checkpoint("llama", folder)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    lines = optimum_lines()
    assert len(lines) == 2, "the page exports and quantises"
    for line in lines:
        # The page names a checkpoint of the hub; the tests have no network.
        arguments = [str(checkpoint) if part.startswith("HuggingFaceTB/") else part for part in line[1:]]
        done = subprocess.run(
            [str(program), *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{shlex.join(line)}: {done.stderr[-2000:]}"
    (folder / "model.onnx").write_bytes((folder / "smol-int8" / "model_quantized.onnx").read_bytes())
    for each in (folder / "smol-int8").glob("*.json"):  # the page's shorter names of the same file
        (folder / each.name).write_bytes(each.read_bytes())
    before = Path.cwd()
    os.chdir(folder)
    try:
        said = play(folder, layers=3)
    finally:
        os.chdir(before)
    found = re.search(r"Hook points: (\d+) found", said["adopt"])
    worst = re.search(r"^ (\S+hook_\S+) +([\d.]+ %)", said["drift"], re.M)
    assert found is not None, said["adopt"]
    assert worst is not None, said["drift"]
    return (
        f"an int8 Llama of `optimum-cli` has all its {found[1]} hook points, a head of it is ablated, and the step whose "
        f"rounding costs most is `{worst[1]}` ({worst[2]} of the logits' error)"
    )
