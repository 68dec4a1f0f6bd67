"""docs/adopting.md: its command lines run, one after the other, on the embedded Llama in the place of the one that it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphlens import embedded_model
from graphlens.deploy import write_stripped
from tests.adopting_page import play, quantised


@pytest.mark.filterwarnings("ignore")
def test_every_command_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = embedded_model("tiny-llama")
    write_stripped(source, tmp_path / "smol")
    quantised(tmp_path, source)
    monkeypatch.chdir(tmp_path)
    play(tmp_path, layers=4)
