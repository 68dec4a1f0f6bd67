"""docs/adopting.md: its command lines run, one after the other, on a tiny model in the place of the one that it names."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import onnx
import pytest
from onnxruntime.quantization import QuantType, quantize_dynamic

from graphlens import embedded_model
from graphlens.deploy import write_stripped
from graphlens.file.folder import copy_settings
from tests.command_line import graphlens

PAGE = Path(__file__).parents[2] / "docs" / "adopting.md"


def commands() -> list[list[str]]:
    """The graphlens commands of the page, in order; what other programs are asked for is made by the test."""
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    lines = [part for block in blocks for line in block.splitlines() for part in line.split(" && ")]
    return [shlex.split(line) for line in lines if not line.startswith("optimum-cli ")]


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What optimum would have left: a float file and an int8 one, each with the tokenizer beside."""
    source = embedded_model("tiny-llama")
    write_stripped(source, tmp_path / "smol")
    (tmp_path / "smol-int8").mkdir()
    quantised = tmp_path / "smol-int8" / "model_quantized.onnx"
    quantize_dynamic(tmp_path / "smol" / "model.onnx", quantised, weight_type=QuantType.QInt8, per_channel=True)
    for folder in (tmp_path / "smol", quantised.parent, tmp_path):
        copy_settings(source, folder)
    shutil.copyfile(quantised, tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_every_command_of_the_page_runs(exported: Path) -> None:
    said = {}
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
    assert (exported / "int8-hooked" / "model.onnx").is_file()
    names = [
        value.name for value in onnx.load(exported / "exposed" / "model.onnx", load_external_data=False).graph.output
    ]
    assert sum("softmax" in name for name in names) >= 4
