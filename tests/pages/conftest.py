"""Fixtures of the tests that look at pages in Chromium."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from graphlens.views import Report, View
from tools.browser import PROGRAM, Browser, Page

Opened = Callable[..., Page]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A browser for all tests. Where there is none, CI fails; elsewhere its tests are skipped, and say what to install."""
    if not Path(PROGRAM).exists() and not os.environ.get("GRAPHLENS_NEEDS_BROWSER"):
        pytest.skip(f"{PROGRAM} is not there: install Debian's chromium, or set CHROMIUM")
    with Browser() as opened:
        yield opened


@pytest.fixture
def shown(browser: Browser, tmp_path: Path) -> Iterator[Opened]:
    """Saves a view or report and opens it; at the end, nothing may have gone wrong, and nothing asked of another machine."""
    pages: list[Page] = []

    def show(view: View | Report, *, dark: bool = False, width: int = 1200) -> Page:
        page = browser.open(view.save(tmp_path / f"page{len(pages)}.html"), dark=dark, width=width)
        assert page.until("document.documentElement.dataset.drawn"), "no view was drawn"
        pages.append(page)
        return page

    yield show
    for page in pages:
        assert page.value("document.documentElement.dataset.failed ?? null") is None
        assert page.faults() == []
        assert page.requests() == []
        page.close()
