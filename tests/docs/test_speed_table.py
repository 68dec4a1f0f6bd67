"""The table of docs/speed.md holds figures that stand on the benchmarks' pages, and is not stale."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tools import speed_table


def test_the_table_is_not_stale() -> None:
    assert speed_table.main(["--check"]) == 0, "run python -m tools.speed_table"


def test_a_figure_is_the_pages() -> None:
    row = speed_table.Row("", "", "peers", "cache_peers", "b1 s16, TransformerLens 4.3")
    ours, theirs, ratio = speed_table.figures(row)
    page = (speed_table.ROOT / "docs/benchmarks-peers.md").read_text(encoding="utf-8")
    (line,) = [
        line for line in page.splitlines() if line.startswith("| b1 s16, TransformerLens 4.3 |") and theirs in line
    ][:1]
    assert ours in line
    assert f"| {ratio} |" in line


@pytest.mark.parametrize("change", [{"begins": "gone"}, {"begins": "b1"}, {"section": "gone"}], ids=str)
def test_a_row_that_is_not_there_once_is_told(change: dict[str, str]) -> None:
    row = dataclasses.replace(speed_table.ROWS[3], **change)
    with pytest.raises(ValueError, match="rows begin with"):
        speed_table.figures(row)


def test_a_stale_table_is_told_and_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = speed_table.PAGE.read_text(encoding="utf-8")
    page = tmp_path / "speed.md"
    page.write_text(good.replace("1.04x", "0.94x"), encoding="utf-8")
    assert page.read_text(encoding="utf-8") != good
    monkeypatch.setattr(speed_table, "PAGE", page)
    assert speed_table.main(["--check"]) == 1
    assert "python -m tools.speed_table" in capsys.readouterr().err
    assert speed_table.main([]) == 0
    assert page.read_text(encoding="utf-8") == good
