"""The documentation's site: links between files become links between pages, and what is wrong with a built one is found."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools.site import checks, notebooks, reference, staging

POLICY = '<meta http-equiv="Content-Security-Policy" content="default-src \'self\'">'
HOMES = {"docs/a.md": "a.md", "docs/adr/1.md": "adr/1.md", "README.md": "index.md", "docs/t/x.py": "t/x.md"}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> staging.Stage:
    found = staging.Stage(tmp_path_factory.mktemp("stage"))
    found.add_repository()
    reference.add_reference(found)
    return found


@pytest.mark.parametrize(
    ("home", "text", "expected"),
    [
        ("README.md", "[one](docs/a.md), [two](docs/adr/1.md#b)", "[one](a.md), [two](adr/1.md#b)"),
        ("docs/adr/1.md", "[up](../a.md) [home](../../README.md#x)", "[up](../a.md) [home](../index.md#x)"),
        ("docs/a.md", "[code](t/x.py), [no page](../tools/house.py)", "[code](t/x.md), no page"),
        ("docs/a.md", "![drawn](pictures/p.svg) [far](https://example.org/a.md)", "![drawn](pictures/p.svg) [far](https://example.org/a.md)"),
        ("docs/adr/1.md", "![drawn](../pictures/p.png)", "![drawn](../pictures/p.png)"),
        ("docs/a.md", "```\n[kept](gone.md)\n```\n[a [b]](adr/1.md)", "```\n[kept](gone.md)\n```\n[a [b]](adr/1.md)"),
        ("docs/a.md", "[here](#there)", "[here](#there)"),
        ("docs/t/x.py", "[notebook](x.ipynb)", "[notebook](x.ipynb)"),
    ],
)  # fmt: skip
def test_links_of_a_file_become_links_of_its_page(home: str, text: str, expected: str) -> None:
    assert staging.relinked(text, home, HOMES[home], HOMES) == expected


def test_every_page_of_docs_is_in_the_menu_once(stage: staging.Stage) -> None:
    menu = tomllib.loads(f"nav = {staging.as_toml(staging.menu(stage.pages))}")["nav"]
    listed = [page for section in menu for rows in section.values() for row in rows for page in row.values()]
    assert sorted(listed) == sorted(stage.pages)
    docs = {path.relative_to(staging.ROOT / "docs").as_posix() for path in (staging.ROOT / "docs").rglob("*.md")}
    assert docs <= set(listed)
    assert next(iter(menu[0].values()))[:2] == [{"graphlens": "index.md"}, {"Start here": "start.md"}]


def test_no_two_entries_of_a_section_are_called_the_same(stage: staging.Stage) -> None:
    for section in staging.menu(stage.pages):
        for name, rows in section.items():
            titles = [title for row in rows for title in row]
            assert sorted({title for title in titles if titles.count(title) > 1}) == [], name


def test_a_page_that_no_section_names_comes_under_how_to() -> None:
    pages = {"index.md": "# a", "fresh.md": "# Something `new`"}
    menu = {name: rows for section in staging.menu(pages) for name, rows in section.items()}
    assert menu["How to"] == [{"Something new": "fresh.md"}]


def test_the_reference_has_every_public_name(stage: staging.Stage) -> None:
    text = "\n".join(text for page, text in stage.pages.items() if page.startswith("api/"))
    for door in reference.DOORS:
        module = door if door == "graphlens" else f"graphlens.{door}"
        names = reference.names_of(door)
        assert names
        missing = [name for name in names if f".{name}\n" not in text and f"`{name}`" not in text]
        assert missing == [], module


def test_the_reference_has_every_command_and_option(stage: staging.Stage) -> None:
    from typer.main import get_command

    from graphlens.cli.app import app

    page = stage.pages["api/commands.md"]
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert len(commands) > 10
    for name, command in commands.items():
        assert f"\n## graphlens {name}\n" in page
        section = page.partition(f"\n## graphlens {name}\n")[2].partition("\n## ")[0]
        options = [option for each in command.params for option in each.opts if option.startswith("--")]
        assert [option for option in options if f"`{option}`" not in section and option != "--help"] == []


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("One line.", "One line."),
        ("Text.\n\n>>> 1 + 1\n2\n\nMore.", "Text.\n\n```pycon\n>>> 1 + 1\n2\n```\n\nMore."),
        ("Text.\n\n    >>> a = 1\n    >>> a\n    1", "Text.\n\n    ```pycon\n    >>> a = 1\n    >>> a\n    1\n    ```"),
        (">>> 1\n1\n\n>>> 2\n2", "```pycon\n>>> 1\n1\n```\n\n```pycon\n>>> 2\n2\n```"),
    ],
)
def test_examples_in_docstrings_become_code(docstring: str, expected: str) -> None:
    assert reference.fenced_examples(docstring) == expected


def site(folder: Path, **files: str) -> Path:
    """A built site of these pages; ``_`` in a name is a slash."""
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_css", ".css")
        if path.suffix == "":
            path = path.with_suffix(".html")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def test_a_good_site_has_no_faults(tmp_path: Path) -> None:
    index = f'{POLICY}<link rel="stylesheet" href="look.css"><h1 id="a">A</h1><a href="b/#c">b</a>'
    index += '<img src="data:image/png;base64,">'
    built = site(
        tmp_path,
        index=index,
        b__index=f'{POLICY}<b id="c"></b><a href="..">up</a> <a href="https://example.org/">far, if the reader wants</a>',
        look_css="a { background: url(data:image/svg+xml,x) }",
    )
    assert checks.faults(built) == []


@pytest.mark.parametrize(
    ("page", "fault"),
    [
        ('<script src="https://cdn.example.org/x.js"></script>', "fetches https://cdn.example.org/x.js"),
        ('<img src="//cdn.example.org/x.png">', "fetches //cdn.example.org/x.png"),
        ('<img srcset="data:x 1x, http://cdn.example.org/2.png 2x">', "fetches http://cdn.example.org/2.png"),
        ('<link rel="preconnect" href="https://fonts.example.org">', "fetches https://fonts.example.org"),
        ("<style>@import 'https://cdn.example.org/a.css';</style>", "fetches https://cdn.example.org/a.css"),
        ('<b style="background: url(https://cdn.example.org/b.png)">', "fetches https://cdn.example.org/b.png"),
        ('<iframe src="https://example.org/"></iframe>', "fetches https://example.org/"),
        ('<svg><use href="https://example.org/a.svg#b"/></svg>', "fetches https://example.org/a.svg#b"),
        ('<a href="gone/">x</a>', "leads nowhere: gone/"),
        ('<a href="#gone">x</a>', "leads nowhere: #gone"),
        ('<a href="../../outside.html">x</a>', "leads nowhere: ../../outside.html"),
        ('<a href="javascript:alert(1)">x</a>', "leads nowhere: javascript:alert(1)"),
        ('<img src="gone.png">', "leads nowhere: gone.png"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_page_is_found(tmp_path: Path, page: str, fault: str) -> None:
    assert checks.faults(site(tmp_path, index=POLICY + page)) == [f"index.html: {fault}"]


def test_a_page_without_a_policy_and_a_stylesheet_that_fetches_are_found(tmp_path: Path) -> None:
    built = site(tmp_path, index="<h1>x</h1>", a_css="b { background: url('https://example.org/x.png') }")
    assert checks.faults(built) == [
        "index.html: has no policy that forbids other machines",
        "a.css: fetches https://example.org/x.png",
    ]


@pytest.mark.parametrize(("html", "frames"), [("", 0), (" \n", 0), ("<b>1</b>", 1)])
def test_progress_that_was_taken_away_leaves_no_empty_frame(tmp_path: Path, html: str, frames: int) -> None:
    item = _Item(output_type="display_data", data={"text/html": html, "text/plain": "<Progress>"})
    shown = notebooks.output_of(item, "x-0-0", tmp_path)
    assert shown.count("<iframe") == frames == len(list(tmp_path.iterdir()))


class _Item(SimpleNamespace):
    """An output as nbformat has it: its fields are attributes, and are also got by name."""

    def get(self, name: str, default: object = None) -> object:
        return getattr(self, name, default)
