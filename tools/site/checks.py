"""What must hold of a built site: nothing is fetched from elsewhere, no link is dead, each page that explains has a picture."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Tags whose attribute makes the browser fetch something, whatever the reader does.
FETCHED = {
    ("audio", "src"), ("embed", "src"), ("iframe", "src"), ("img", "src"), ("img", "srcset"), ("image", "href"),
    ("image", "xlink:href"),
    ("input", "src"), ("link", "href"), ("object", "data"), ("script", "src"), ("source", "src"), ("source", "srcset"),
    ("track", "src"), ("use", "href"), ("use", "xlink:href"), ("video", "poster"), ("video", "src"),
}  # fmt: skip
IN_STYLE = re.compile(r"""(?:url\(\s*["']?|@import\s+["'])([^"')\s]+)""")
POLICY = "default-src 'self'"


class Page(HTMLParser):
    """What a page fetches, what it links to, which anchors and pictures it has, and its policy of contents."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.pictures: list[tuple[str, str]] = []
        self.policy = ""
        self._style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes what a tag asks for."""
        given = {name: value or "" for name, value in attrs}
        self._style = tag == "style"
        for name, value in given.items():
            if (tag, name) in FETCHED and not (tag == "link" and given.get("rel") in ("canonical", "prev", "next")):
                self.fetched += (
                    [part.split()[0] for part in value.split(",") if part.split()] if name == "srcset" else [value]
                )
            if name == "style":
                self.fetched += IN_STYLE.findall(value)
        if tag == "img":
            self.pictures.append((given.get("src", ""), given.get("alt", "")))
        elif tag == "iframe":  # what a tutorial's cell showed
            self.pictures.append((given.get("src", ""), given.get("title", "")))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "meta" and given.get("http-equiv", "").lower() == "content-security-policy":
            self.policy = given.get("content", "")

    def handle_endtag(self, tag: str) -> None:
        """Notes the end of a style."""
        self._style = False

    def handle_data(self, data: str) -> None:
        """Notes what a style asks for."""
        if self._style:
            self.fetched += IN_STYLE.findall(data)


def is_elsewhere(address: str) -> bool:
    """True of an address on another machine."""
    return bool(urlsplit(address).netloc) or urlsplit(address).scheme in ("http", "https", "ftp", "ws", "wss")


def faults(site: Path) -> list[str]:
    """What is wrong with a built site, a line each: (page, what, address)."""
    site = site.resolve()
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        found += [f"{name}: fetches {address}" for address in page.fetched if is_elsewhere(address)]
        # What a tutorial's cell showed is a page in a frame, and has no policy of the site's.
        if "cell-output" not in name and not name.startswith("tutorials/") and not page.policy.startswith(POLICY):
            found.append(f"{name}: has no policy that forbids other machines")
        if name == "404.html":
            continue  # served at any address, so its links are from the root
        local = [address for address in (*page.links, *page.fetched) if not is_elsewhere(address)]
        found += [f"{name}: leads nowhere: {address}" for address in local if _is_dead(site, path, address, pages)]
    for path in sorted(site.rglob("*.css")):
        name = path.relative_to(site).as_posix()
        addresses = IN_STYLE.findall(path.read_text(encoding="utf-8"))
        found += [f"{name}: fetches {address}" for address in addresses if is_elsewhere(address)]
    return found


def without_pictures(site: Path, pages: Iterable[str]) -> list[str]:
    """Which pages show no picture, and which pictures have no words for those who do not see them.

    Args:
        site: The built site.
        pages: The pages that must have one, as the stage names them: "drift.md".

    Returns:
        A line for each page or picture.
    """
    found = []
    for name in pages:
        path = site / ("index.html" if name == "index.md" else f"{name.removesuffix('.md')}/index.html")
        shown = Page(path.read_text(encoding="utf-8")).pictures
        if not shown:
            found.append(f"{name}: shows no picture")
        found += [f"{name}: no words stand for the picture {source}" for source, words in shown if not words.strip()]
    return found


def _is_dead(site: Path, path: Path, address: str, pages: dict[Path, Page]) -> bool:
    parts = urlsplit(address)
    if parts.scheme in ("data", "mailto", "javascript", "blob"):
        return parts.scheme == "javascript"
    target = path
    if parts.path:
        below = site if parts.path.startswith("/") else path.parent
        target = (below / unquote(parts.path).lstrip("/")).resolve()
        if target.is_dir():
            target /= "index.html"
    if not target.exists() or not target.is_relative_to(site):
        return True
    other = pages.get(target)
    return bool(parts.fragment and other is not None and unquote(parts.fragment) not in other.anchors | {"__top"})
