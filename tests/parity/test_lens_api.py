"""docs/transformerlens.md has the table that its generator prints, and nothing is absent without a reason."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from graphlens.lens.absent import reason_for, reasons
from tools import transformerlens_api as api


@pytest.fixture(scope="module")
def found() -> list[api.Module]:
    return api.modules()


def test_the_committed_table_is_what_the_generator_prints(
    found: list[api.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "modules", lambda: found)
    assert api.main(["--check"]) == 0, "run python -m tools.transformerlens_api"


def test_nothing_is_absent_without_a_reason(found: list[api.Module]) -> None:
    rows = [row for module in found for row in module.rows]
    assert [row.name for row in rows if row.status == api.ABSENT and not row.note] == []
    assert [row.name for row in rows if row.status == api.DIFFERENT and not row.note] == []
    assert len(rows) > 500


def test_no_reason_is_left_over(found: list[api.Module]) -> None:
    """A reason for what is there now, or never was, misleads."""
    rows = {row.name.partition(" (")[0]: row for module in found for row in module.rows}
    absent, different = reasons()
    used = {reason_for(name) for name, row in rows.items() if row.status == api.ABSENT}
    assert [pattern for pattern, reason in absent.items() if reason not in used] == []
    notes = " ".join(row.note for row in rows.values())
    assert [name for name, how in different.items() if how not in notes] == []


def test_it_sees_what_differs() -> None:
    def theirs(a: int, b: int = 1, *, c: int = 2, gone: int = 3) -> None: ...
    def ours(b: int = 5, *, a: int, c: int = 2) -> None: ...

    def phrases(one: Any, other: Any) -> list[str]:
        parameters = [dict(inspect.signature(each).parameters) for each in (one, other)]
        return api.arguments(*parameters, lambda _: None)

    assert phrases(theirs, theirs) == []
    assert phrases(theirs, ours) == [
        "`a` is passed by name",
        "`b` stands in another place: pass it by name",
        "`b` is `5` unless told, not `1`",
        "takes no `gone`",
    ]
    assert phrases(lambda a, b: 0, lambda a: 0) == ["takes no `b`"]
    assert phrases(lambda a: 0, lambda a, b: 0) == ["needs `b`"]


def test_a_stale_page_is_told_and_written_anew(
    found: list[api.Module], tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(api, "modules", lambda: found)
    good = api.PAGE.read_text(encoding="utf-8")
    page = tmp_path / "transformerlens.md"
    page.write_text(good.replace("| absent |", "| same |"), encoding="utf-8")
    monkeypatch.setattr(api, "PAGE", page)
    assert api.main(["--check"]) == 1
    assert "stale" in capsys.readouterr().err
    assert api.main([]) == 0
    assert page.read_text(encoding="utf-8") == good
