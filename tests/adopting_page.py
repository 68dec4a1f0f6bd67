"""The command lines of docs/adopting.md, played on files that stand for those that it names."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from graphlens.file.folder import copy_settings
from tests.command_line import graphlens

PAGE = Path(__file__).parents[1] / "docs" / "adopting.md"


def commands() -> list[list[str]]:
    """The graphlens commands of the page, in order; what other programs are asked for is made by the test."""
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    lines = [part for block in blocks for line in block.splitlines() for part in line.split(" && ")]
    return [shlex.split(line) for line in lines if not line.startswith("optimum-cli ")]


def quantised(folder: Path, settings: Path) -> None:
    """Adds to ``smol/model.onnx`` what optimum would have left: an int8 file, and the tokenizer beside each."""
    (folder / "smol-int8").mkdir()
    target = folder / "smol-int8" / "model_quantized.onnx"
    quantize_dynamic(folder / "smol" / "model.onnx", target, weight_type=QuantType.QInt8, per_channel=True)
    for beside in (folder / "smol", target.parent, folder):
        copy_settings(settings, beside)
    shutil.copyfile(target, folder / "model.onnx")


def play(folder: Path, layers: int) -> dict[str, str]:
    """Runs each command in turn in the working folder, which is ``folder``, and looks at what they say and leave.

    Returns:
        The command's name -> what it said, each time that it was given.
    """
    said: dict[str, str] = {}
    lines = commands()
    assert all(line[0] == "graphlens" for line in lines)
    assert len(lines) >= 10
    for line in lines:
        done = graphlens(*line[1:])
        assert done.returncode == 0, f"{shlex.join(line)}: {done.stderr}"
        said[line[1]] = said.get(line[1], "") + done.stdout
    assert "recovered" in said["drift"]
    assert "nodes_to_exclude" in said["drift"]
    assert "dynamic int8, one scale a channel" in said["inspect"]
    assert "Nothing was written" in said["adopt"]
    assert "ablated" in said["run"]
    assert (folder / "int8-hooked" / "model.onnx").is_file()
    exposed = onnx.load(folder / "exposed" / "model.onnx", load_external_data=False)
    assert sum("softmax" in value.name.lower() for value in exposed.graph.output) >= layers
    return said
