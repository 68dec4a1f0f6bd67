"""Which pages the site has, where each lies, and its menu; links between files of the repository become links between pages."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]+)\)")
PICTURES = {".png", ".svg"}
# Files outside of docs/ that are pages too.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "models/tiny-gpt2/README.md": "cards/tiny-gpt2.md",
    "models/tiny-gpt2-saes/README.md": "cards/tiny-gpt2-saes.md",
    "models/tiny-llama/README.md": "cards/tiny-llama.md",
}
# The menu, but for what fills itself: tutorials, reference pages, benchmarks, decisions. A page of docs/ that is named
# nowhere comes at the end of "How to".
HOW_TO = (
    *(
        "interventions",
        "patching",
        "attribution",
        "harvest",
        "scale",
        "saes",
        "attribution-graphs",
        "pages",
        "live-page",
    ),
    *("adopting", "drift", "drivable", "gpu", "families", "configs", "encoders", "vision", "large-models"),
)
COMING_FROM = ("transformerlens", "transformerlens4")
REFERENCE = ("hooked-file", "edits", "models", "operators", "parity", "adopted-files")
# Titles of the menu that are not the page's own: pages that a command of tools/bench writes have one and the same.
SHORT = {
    "index.md": "graphlens",
    "adr/index.md": "Decisions",
    "benchmarks.md": "Opening, reading, hooks",
    "benchmarks-configs.md": "Models from a config",
    "benchmarks-pages.md": "Pages",
}
TRUST = ("security", "hostile", "faults", "scale-tests", "sae-tests")


@dataclass
class Stage:
    """The pages of the site before it is built.

    Attributes:
        folder: Where the builder finds them.
        pages: Page, as a path in the site -> its text.
        homes: File of the repository, as a path from its root -> the page it becomes.
    """

    folder: Path
    pages: dict[str, str] = field(default_factory=dict)
    homes: dict[str, str] = field(default_factory=dict)

    def add(self, page: str, text: str, home: str | None = None) -> None:
        """Takes a page up."""
        self.pages[page] = text
        if home is not None:
            self.homes[home] = page

    def add_repository(self) -> None:
        """Takes up every Markdown file of docs/, and those outside that are pages."""
        for path in sorted((ROOT / "docs").rglob("*.md")):
            page, text = path.relative_to(ROOT / "docs").as_posix(), path.read_text(encoding="utf-8")
            if not text.strip():
                raise ValueError(f"docs/{page} is empty: write its heading at least.")
            self.add(page, text, f"docs/{page}")
        for home, page in OUTSIDE.items():
            self.add(page, (ROOT / home).read_text(encoding="utf-8"), home)
        decisions = [page for page in sorted(self.pages) if page.startswith("adr/")]
        lines = [f"- [{title(self.pages[page])}]({page.removeprefix('adr/')})" for page in decisions]
        text = "# Decisions\n\nWhat was decided, what was measured for it, and what follows.\n\n" + "\n".join(lines)
        self.add("adr/index.md", text + "\n", "docs/adr")

    def write(self) -> None:
        """Writes all pages, with their links made right, and the pictures that lie in docs/."""
        sources = {page: home for home, page in self.homes.items()}
        for page, text in self.pages.items():
            path = self.folder / "pages" / page
            path.parent.mkdir(parents=True, exist_ok=True)
            home = sources.get(page)
            path.write_text(relinked(text, home, page, self.homes) if home else text, encoding="utf-8")
        for path in (ROOT / "docs").rglob("*"):
            if path.suffix in PICTURES:
                target = self.folder / "pages" / path.relative_to(ROOT / "docs")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


def title(text: str) -> str:
    """The first heading of a page."""
    found = re.search(r"^# +(.+)$", text, re.M)
    if found is None:
        raise ValueError(f"a page has no heading: it begins with {text[:60]!r}.")
    return found.group(1).replace("`", "")


def relinked(text: str, home: str, page: str, homes: dict[str, str]) -> str:
    """The text of a file as a page of the site.

    Args:
        text: Markdown, whose links are relative to the file.
        home: The file, as a path from the root of the repository.
        page: The page that it becomes.
        homes: File -> page, for all files that are pages.

    Returns:
        The text with links to other pages and to pictures. What a link names besides (code, a licence) stays as words: the
        site does not hold it.
    """

    def link(found: re.Match[str]) -> str:
        target, _, heading = found["target"].partition("#")
        if "://" in target or target.startswith("mailto:") or not target or target.endswith(".ipynb"):
            return found[0]  # a notebook is made beside its page
        path = _normal(f"{home}/../{target}")
        other = homes.get(path)
        if other is None and Path(path).suffix in PICTURES and path.startswith("docs/"):
            other = path.removeprefix("docs/")
        if other is None:
            return found["text"]
        up = "../" * page.count("/")
        return f"{found['image']}[{found['text']}]({up}{other}{'#' + heading if heading else ''})"

    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def _normal(path: str) -> str:
    """A relative path without its ``..``."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def wants_picture(page: str) -> bool:
    """True of pages that explain or measure; not of the reference of code, of decisions and of what is kept for the record."""
    return not page.startswith(("api/", "adr/", "cards/")) and page not in ("contributing.md", "changelog.md")


Menu = list[dict[str, "str | Menu"]]


def menu(pages: dict[str, str]) -> Menu:
    """The site's menu: title -> page, in sections.

    Raises:
        ValueError: If a page is in it twice, or not at all.
    """
    benchmarks = sorted(page for page in pages if re.fullmatch(r"benchmarks(-.*)?\.md", page))
    sections: dict[str, list[str]] = {
        "Start": ["index.md", "start.md", "glossary.md"],
        "Tutorials": sorted(page for page in pages if page.startswith("tutorials/")),
        "How to": [f"{name}.md" for name in HOW_TO],
        "Coming from": [f"{name}.md" for name in COMING_FROM],
        "API": [page for page in pages if page.startswith("api/")],
        "Reference": [f"{name}.md" for name in REFERENCE],
        "Benchmarks": ["speed.md", *benchmarks],
        "Trust": [f"{name}.md" for name in TRUST],
        "Project": [
            *(
                "contributing.md",
                "changelog.md",
                "cards/tiny-gpt2.md",
                "cards/tiny-llama.md",
                "cards/tiny-gpt2-saes.md",
            ),
            *sorted(page for page in pages if page.startswith("adr/") and page != "adr/index.md"),
        ],
    }
    named = [page for names in sections.values() for page in names]
    sections["How to"] += [page for page in pages if page not in named and page != "adr/index.md"]
    sections["Project"].insert(5, "adr/index.md")
    listed = [page for names in sections.values() for page in names if page in pages]
    if sorted(listed) != sorted(pages):
        raise ValueError(f"these pages are in the menu twice: {sorted({p for p in listed if listed.count(p) > 1})}.")
    return [
        {name: [{SHORT.get(page, title(pages[page])): page} for page in names if page in pages]}
        for name, names in sections.items()
    ]


def as_toml(items: Menu) -> str:
    """A menu as a TOML value."""

    def value(item: str | Menu) -> str:
        return json.dumps(item, ensure_ascii=False) if isinstance(item, str) else as_toml(item)

    pairs = (
        f"{{ {json.dumps(key, ensure_ascii=False)} = {value(item)} }}" for row in items for key, item in row.items()
    )
    return f"[{', '.join(pairs)}]"


def write_settings(stage: Stage) -> Path:
    """Writes zensical.toml with the menu beside the pages, and the look; returns the file."""
    settings = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    if "\nnav = []\n" not in settings:
        raise ValueError("zensical.toml lacks the line 'nav = []', where the menu goes.")
    path = stage.folder / "zensical.toml"
    settings = settings.replace("\nnav = []\n", f"\nnav = {as_toml(menu(stage.pages))}\n")
    settings = settings.replace('paths = ["."]', f"paths = [{json.dumps(str(ROOT))}]")
    path.write_text(settings.replace('"tools/site/', f'"{ROOT}/tools/site/'), encoding="utf-8")
    look = Path(__file__).with_name("look")
    shutil.copytree(look / "overrides", stage.folder / "overrides")
    (stage.folder / "pages" / "look").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(look / "site.css", stage.folder / "pages" / "look" / "site.css")
    return path
