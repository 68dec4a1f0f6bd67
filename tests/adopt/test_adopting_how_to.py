"""docs/adopting.md on a file that torch exported of a tiny Llama checkpoint, with past keys and values, as optimum's are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.adopt.torch_routes import legacy
from tests.adopting_page import play, quantised
from tests.families.worded import worded_checkpoint


@pytest.mark.filterwarnings("ignore")
def test_every_command_of_the_page_runs_on_an_export_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = worded_checkpoint("llama", tmp_path)
    (tmp_path / "smol").mkdir()
    legacy("llama", checkpoint, tmp_path / "smol" / "model.onnx", past=True)
    quantised(tmp_path, checkpoint)
    monkeypatch.chdir(tmp_path)
    play(tmp_path, layers=2)
