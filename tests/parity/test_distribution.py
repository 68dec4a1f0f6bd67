"""What an index shows of the distribution: version, addresses, classifiers, and a readme whose links lead somewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager

import graphlens
from hatch_build import LINK, absolute

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def metadata() -> ProjectMetadata[PluginManager]:
    return ProjectMetadata(str(ROOT), PluginManager())


def test_it_is_this_version_with_addresses_and_classifiers(metadata: ProjectMetadata[PluginManager]) -> None:
    assert metadata.version == graphlens.__version__
    assert {"Repository", "Documentation", "Changelog", "Issues"} <= set(metadata.core.urls)
    pythons = {"3.11", "3.12", "3.13"}
    assert {f"Programming Language :: Python :: {version}" for version in pythons} <= set(metadata.core.classifiers)


def test_the_repositorys_address_stands_in_one_table(metadata: ProjectMetadata[PluginManager]) -> None:
    """A repository that moves is one table of pyproject.toml to change: nothing else spells its address."""
    base = metadata.core.urls["Repository"].rstrip("/")
    assert all(url == base or url.startswith(f"{base}/") for url in metadata.core.urls.values())
    place = base.partition("://")[2]
    folders = ("graphlens", "docs", "tools", "tests", "models")
    files = [*ROOT.glob("*.*"), *(file for folder in folders for file in (ROOT / folder).rglob("*"))]
    texts = {".md", ".py", ".toml", ".js", ".html", ".json", ".svg", ".css", ".txt"}
    spelt = [
        file.relative_to(ROOT).as_posix()
        for file in files
        if file.suffix in texts and "node_modules" not in file.parts and place in file.read_text(encoding="utf-8")
    ]
    assert spelt == ["pyproject.toml"]


def test_every_link_of_the_readme_is_absolute_and_leads_to_a_file(metadata: ProjectMetadata[PluginManager]) -> None:
    shown = metadata.core.readme
    assert not LINK.search(shown)
    base = f"{metadata.core.urls['Repository'].rstrip('/')}/"
    paths = re.findall(rf"{re.escape(base)}(?:blob|raw)/v{re.escape(metadata.version)}/([^)#\s\"]+)", shown)
    assert len(paths) == len(LINK.findall(README)) > 0
    for path in paths:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("[a](docs/a.md#part)", "[a](R/blob/v1/docs/a.md#part)"),
        ("![a](./docs/a.png)", "![a](R/raw/v1/docs/a.png)"),
        ('<img src="docs/a.svg" width="9">', '<img src="R/raw/v1/docs/a.svg" width="9">'),
        ("[a](https://x.example/a.md) [b](#part) [c](mailto:a@x.example)",) * 2,
    ],
)
def test_links_to_files_go_to_the_repository(text: str, made: str) -> None:
    assert absolute(text, "R", "v1") == made


def test_the_changelog_begins_with_this_version() -> None:
    (first,) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[:1]
    assert first == graphlens.__version__
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]
