"""A page: views one below the other in one file that needs nothing else, and the same inside a notebook."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

from graphlens.errors import GraphlensError, InputError
from graphlens.file.folder import replacing, user_path
from graphlens.views.encoded import Json, script_json

LARGEST = 24_000_000  # bytes of a page's data: more makes a browser slow
KINDS = (
    "attention",
    "heat",
    "lens",
    "text",
    "bars",
    "circuit",
    "attribution",
    "table",
)  # of views that assets/ has a script for
_ABOUT_A_PAGE = (
    "This page needs JavaScript to draw its views; their data is in it, and nothing is loaded from elsewhere."
)


@dataclass(frozen=True)
class View:
    """One thing to look at: shown by itself in a notebook, saved as a page, or put into a report with others.

    Attributes:
        kind: Which script draws it: one of KINDS; empty for text alone.
        title: The line above it.
        data: What the script draws, as JSON.
        says: What the numbers are, with their unit and definition; paragraphs.
        height: About how high it is, in pixels.
    """

    kind: str
    title: str
    data: Mapping[str, Json]
    says: tuple[str, ...] = ()
    height: int = 420

    def view(self) -> View:
        """The view itself: what ``report`` asks of everything that it is given."""
        return self

    def report(self) -> Report:
        """A page of this view alone."""
        return Report((self,), self.title)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes a page of this view alone.

        Args:
            path: Where; ".html" is added where it has no ending.

        Returns:
            The path written.

        Raises:
            InputError: As ``Report.save``.
        """
        return self.report().save(path)

    def _repr_html_(self) -> str:
        return self.report().frame()

    def __repr__(self) -> str:
        return f"View({self.kind or 'text'!r}, {self.title!r}); .save('page.html') writes it"


@runtime_checkable
class Viewable(Protocol):
    """What shows itself: a SweepResult, an ActivationCache, a DriftResult, a View."""

    def view(self) -> View | Report:
        """What to show of it."""


# What a report is made of. A text is a paragraph.
Part: TypeAlias = "Viewable | str"


@dataclass(frozen=True)
class Report:
    """Views one below the other: one HTML file, which needs no network and no other file.

    Attributes:
        views: The views, in order.
        title: The page's title.
        lead: Paragraphs below the title.
    """

    views: tuple[View, ...]
    title: str
    lead: tuple[str, ...] = ()

    def view(self) -> Report:
        """The report itself: its views go into another report one by one."""
        return self

    def html(self) -> str:
        """The page.

        Raises:
            InputError: Its data is larger than a browser opens well; the sentence has the sizes.
        """
        data = script_json({"views": [{"kind": view.kind, "data": view.data} for view in self.views]})
        if len(data) > LARGEST:
            raise InputError(
                f"a page of {len(data) / 1e6:.0f} MB would not open well ({LARGEST / 1e6:.0f} MB is the most): make several "
                "reports, or give the views fewer layers, heads or positions."
            )
        return document(self.title, self._body(), data, {view.kind for view in self.views})

    def _body(self) -> str:
        """What stands on the page before any script has run."""
        sections = []
        for index, view in enumerate(self.views):
            title = (
                f"<h2>{_text(view.title)}</h2>"
                if view.title and (view.title != self.title or len(self.views) > 1)
                else ""
            )
            says = "".join(f'<p class="dim">{_text(line)}</p>' for line in view.says)
            sections.append(
                f'<section data-kind="{_text(view.kind)}">{title}{says}<div id="view-{index}"></div></section>'
            )
        lead = "".join(f"<p>{_text(line)}</p>" for line in self.lead)
        heading = f"<h1>{_text(self.title)}</h1>" if self.title else ""
        return f"<main>{heading}{lead}{''.join(sections)}</main>"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the page as one HTML file, whole or not at all.

        Args:
            path: Where; ".html" is added where it has no ending.

        Returns:
            The path written.

        Raises:
            InputError: For another ending than .html and .htm, where it cannot be written, and where it would be too large.
        """
        target = user_path(path)
        target = target if target.suffix else target.with_name(f"{target.name}.html")
        if target.suffix.lower() not in (".html", ".htm"):
            raise InputError(f"{target}: a page ends in .html.")
        page = self.html()
        try:
            with replacing(target) as made:
                made.write_text(page, encoding="utf-8", newline="\n")
        except OSError as error:
            raise InputError(f"{target}: cannot be written ({error}).") from error
        return target

    def frame(self) -> str:
        """The page for a notebook: in a frame of its own, so that neither's style nor scripts reach the other.

        What cannot be drawn becomes a sentence: a notebook shows an object whose HTML fails as an error of many lines.
        """
        try:
            page = self.html()
        except InputError as error:
            return f"<p>{_text(str(error))}</p>"
        height = min(900, 90 + sum(view.height for view in self.views))
        return (
            f'<iframe title="{_text(self.title or "graphlens")}" sandbox="allow-scripts" width="100%" height="{height}" '
            'style="border: 1px solid #8888; border-radius: 6px; resize: vertical" '
            f'srcdoc="{html.escape(page, quote=True)}"></iframe>'
        )

    def _repr_html_(self) -> str:
        return self.frame()

    def __repr__(self) -> str:
        return f"Report({self.title!r}, {len(self.views)} views); .save('page.html') writes it"


def report(parts: Iterable[Part] | Part, title: str | None = None, lead: Sequence[str] | str = ()) -> Report:
    """Puts views one below the other on a page: ``views.report([cache, sweep_result]).save("report.html")``.

    Args:
        parts: Views, and what has a ``view()``: SweepResult, ActivationCache, DriftResult, hook_points(), a model, its cfg.
            A text is a paragraph.
        title: The page's title; None for that of the only part.
        lead: Paragraphs below the title.

    Returns:
        The page, which a notebook shows and ``save`` writes.

    Raises:
        InputError: For an empty list, and for what is no view.
    """
    given = [parts] if isinstance(parts, str | Viewable) else list(parts)
    if not given:
        raise InputError("the report is empty: give it at least one view.")
    found: list[View] = []
    leads = [lead] if isinstance(lead, str) else list(lead)
    for part in given:
        if isinstance(part, str):
            found.append(View("", "", {}, (part,), 60))
            continue
        is_array = hasattr(part, "dtype") and hasattr(part, "shape")  # which have a view() of their own
        made = None if is_array or isinstance(part, type) or not isinstance(part, Viewable) else part.view()
        if not isinstance(made, View | Report):
            raise InputError(
                f"a report is made of views and texts, not {type(part).__name__}: views.attention(cache, tokens), say, or a "
                "result of sweep()."
            )
        found += made.views if isinstance(made, Report) else [made]
        if len(given) == 1 and title is None:
            title, leads = made.title, [*leads, *(made.lead if isinstance(made, Report) else ())]
    return Report(tuple(found), "graphlens report" if title is None else str(title), tuple(leads))


def in_notebook(shown: Viewable) -> str:
    """What an object's ``_repr_html_`` gives: its views in a frame, or the sentence that says why there are none.

    Args:
        shown: The object.
    """
    try:
        made = shown.view()
        return (made.report() if isinstance(made, View) else made).frame()
    except GraphlensError as error:
        return f"<p>{_text(str(error))}</p>"


@functools.cache
def asset(name: str) -> str:
    """The text of a file of ``graphlens/views/assets``: "look.css", "core.js"."""
    return (files("graphlens.views") / "assets" / name).read_text(encoding="utf-8")


def document(title: str, body: str, data: str, kinds: Iterable[str]) -> str:
    """A whole HTML document that allows no script, style or address but its own.

    Args:
        title: The title, as text.
        body: The body's HTML, safe.
        data: JSON, as ``script_json`` writes it.
        kinds: The kinds of views whose scripts it needs.
    """
    style = asset("look.css") + asset("views.css")
    needed = [f"{kind}.js" for kind in KINDS if kind in set(kinds)]
    script = "".join(asset(name) for name in ("core.js", *needed, "start.js"))
    own = f"script-src '{_digest(script)}'; style-src '{_digest(style)}'"
    policy = f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="generator" content="graphlens">\n'
        f"<title>{_text(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n"
        f"<noscript><p>{_ABOUT_A_PAGE}</p></noscript>\n"
        f'<script type="application/json" id="graphlens-data">{data}</script>\n<script>{script}</script>\n</body>\n</html>\n'
    )


def _digest(text: str) -> str:
    """What a Content-Security-Policy calls a script or style of that text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


def _text(text: str) -> str:
    """Text as HTML shows it, as content or as a quoted attribute."""
    plain = text.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair is no character of a file
    shown = "".join(c if c.isprintable() or c in "\n\t" or _is_space(c) else "\N{REPLACEMENT CHARACTER}" for c in plain)
    return html.escape(shown if len(shown) <= 2000 else f"{shown[:2000]}… ({len(shown)} characters)", quote=True)


def _is_space(character: str) -> bool:
    """True of the spaces of all scripts, a no-break or an ideographic one say, which Python calls unprintable."""
    return unicodedata.category(character) == "Zs"
