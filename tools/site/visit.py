"""Opens pages of the built site in Chromium over HTTP: what fails there, and what they ask of other machines."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tools.browser import Browser, Page
from tools.serving import serving

# All text of the page, what stands in its parts' own trees too: the search's results do.
TEXT = """(() => {
  const inner = (root) => [...root.querySelectorAll("*")].map((each) => each.shadowRoot).filter(Boolean);
  const text = (root) => [root.textContent, ...inner(root).map(text)];
  return text(document.body).flat(9).join(" ");
})()"""


def visited(site: Path, pages: Iterable[str], word: str) -> list[str]:
    """What goes wrong in a browser.

    Args:
        site: The built site.
        pages: Which pages, as addresses within it: "", "start/".
        word: What is searched for on the first one; it must be found.

    Returns:
        A line for each fault: an exception, a message of the policy, a request to another machine, a search that finds nothing.
    """
    found: list[str] = []
    with serving(site) as base, Browser() as browser:
        for number, name in enumerate(pages):
            page = browser.open(base + name)
            if number == 0:
                found += _searched(page, word)
            page.value("new Promise((done) => setTimeout(done, 300))")  # for what a page does after it is loaded
            found += [f"{name or 'index'}: {fault}" for fault in page.faults()]
            found += [f"{name or 'index'}: asks {ask}" for ask in page.requests() if not ask.startswith(base)]
            page.close()
    return found


def _searched(page: Page, word: str) -> list[str]:
    """Searches as a reader does; a line if nothing is found."""
    page.click(".md-search__button")
    page.value("new Promise((done) => setTimeout(done, 300))")  # for its field to take what is typed
    page.send("Input.insertText", text=word)
    try:
        page.until(f"/[1-9][0-9]* results/.test({TEXT})", 20)
    except TimeoutError:
        return [f"searching for {word!r} finds nothing"]
    return []
