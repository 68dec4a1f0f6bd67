"""docs/saes.md's tables are those of the register, and docs/sae-tests.md has no line that failed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.saes.oracle_check import TOLERANCE
from tools import sae_tables

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_tables_are_not_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sae_tables.main(["--check"]) == 0, "run python -m tools.sae_tables"
    good = sae_tables.PAGE.read_text(encoding="utf-8")
    page = tmp_path / "saes.md"
    page.write_text(good.replace("| `gated` | `b_gate`", "| `gated` | `b_enc`"), encoding="utf-8")
    monkeypatch.setattr(sae_tables, "PAGE", page)
    assert sae_tables.main(["--check"]) == 1
    assert "python -m tools.sae_tables" in capsys.readouterr().err
    assert sae_tables.main([]) == 0
    assert page.read_text(encoding="utf-8") == good


def test_every_sae_that_was_compared_with_its_library_is_as_near_as_promised() -> None:
    rows = re.findall(
        r"^\| (\S+) \| `\S+` \| (\d+) \| (\S+) \| (\S+) \|$", (DOCS / "sae-tests.md").read_text(encoding="utf-8"), re.M
    )
    assert len(rows) > 50
    for name, _, error, back in rows:
        assert float(error) <= TOLERANCE, name
        assert back == "-" or float(back) <= TOLERANCE, name
