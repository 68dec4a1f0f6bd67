"""Pages of the site are opened in Chromium: what fails there, and what they ask of other machines, is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools.browser import PROGRAM
from tools.site.visit import visited

pytestmark = pytest.mark.skipif(
    not Path(PROGRAM).exists() and not os.environ.get("GRAPHLENS_NEEDS_BROWSER"),
    reason="needs Debian's chromium, or CHROMIUM",
)
POLICY = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'self' 'unsafe-inline'\">"
SEARCH = """<button class="md-search__button" onclick="document.querySelector('input').focus()">Search</button><input><div></div>
<script>
  const root = document.querySelector("div").attachShadow({mode: "open"});
  document.querySelector("input").oninput = (event) => {
    root.textContent = (event.target.value === "residual" ? 12 : 0) + " results";
  };
</script>"""
PICTURE = '<img src="http://127.0.0.2:9/x.png">'


def write(site: Path, name: str, text: str) -> Path:
    site.joinpath(name).mkdir(parents=True, exist_ok=True)
    site.joinpath(name, "index.html").write_text(
        f'<!doctype html><link rel="icon" href="data:,">{text}', encoding="utf-8"
    )
    return site


def test_a_good_site_is_visited_and_searched(tmp_path: Path) -> None:
    site = write(write(tmp_path, "", POLICY + SEARCH), "more", POLICY)
    assert visited(site, ["", "more/"], "residual") == []


def test_what_a_page_asks_of_another_machine_is_told(tmp_path: Path) -> None:
    site = write(write(tmp_path, "", SEARCH), "more", PICTURE)
    told = visited(site, ["", "more/"], "residual")
    assert "more/: asks http://127.0.0.2:9/x.png" in told


def test_what_the_policy_forbids_and_what_throws_is_told(tmp_path: Path) -> None:
    site = write(
        write(tmp_path, "", POLICY + PICTURE + SEARCH), "more", "<script>throw new Error('on purpose')</script>"
    )
    told = visited(site, ["", "more/"], "residual")
    assert any(line.startswith("index: ") and "violates" in line for line in told), told
    assert any(line.startswith("more/: ") and "on purpose" in line for line in told), told


def test_a_search_that_finds_nothing_is_told(tmp_path: Path) -> None:
    site = write(tmp_path, "", POLICY + SEARCH)
    assert visited(site, [""], "residue") == ["searching for 'residue' finds nothing"]
