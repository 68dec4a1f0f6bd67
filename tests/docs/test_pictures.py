"""The pictures of README and docs are those that tools/pictures.py makes, and the drawing names hook points that exist."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from graphlens import Ablate, HookedTransformer
from tools import pictures

ROOT = Path(__file__).resolve().parents[2]


def test_the_pictures_are_those_that_the_script_makes() -> None:
    assert {path.name for path in pictures.FOLDER.iterdir()} == set(pictures.NAMES)
    for name in pictures.NAMES:
        if name == "block.svg":
            continue
        assert (pictures.FOLDER / name).read_bytes().startswith(b"\x89PNG\r\n")


def test_every_picture_is_shown_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = {name for page in pages for name in re.findall(r"pictures/([\w.-]+)", page.read_text(encoding="utf-8"))}
    assert shown == {path.name for path in pictures.FOLDER.iterdir()}


def test_the_drawing_of_a_block_is_not_stale_and_loads_nothing() -> None:
    text = (pictures.FOLDER / "block.svg").read_text(encoding="utf-8")
    assert text == pictures.block(), "run python -m tools.pictures block.svg"
    root = ElementTree.fromstring(text)
    assert not [value for item in root.iter() for name, value in item.attrib.items() if name.endswith(("href", "src"))]


def test_the_drawing_names_every_hook_point_of_a_block(tiny: HookedTransformer) -> None:
    of_block = {name.removeprefix("blocks.1.") for name in tiny.hook_points() if name.startswith("blocks.1.")}
    assert pictures.hook_names() == of_block
    text = (pictures.FOLDER / "block.svg").read_text(encoding="utf-8")
    assert [name for name in of_block if name.rpartition(".")[2] not in text] == []


def test_the_live_page_in_the_readme_shows_what_its_words_say(tiny: HookedTransformer) -> None:
    """The picture is that of head 1.0 off: its words tell Mary's probability."""
    words = re.search(
        r"!\[[^]]*falls from ([\d.]+) to ([\d.]+)\]\(docs/pictures/live.png\)", (ROOT / "README.md").read_text()
    )
    assert words is not None
    mary = tiny.to_single_token(" Mary")
    for edits, said in (([], words[1]), ([Ablate("blocks.1.attn.hook_z", heads=0)], words[2])):
        logits = tiny.run_with_interventions(pictures.CLEAN, edits)[0, -1].astype(np.float64)
        assert f"{np.exp(logits - logits.max())[mary] / np.exp(logits - logits.max()).sum():.2f}" == said


def test_an_unknown_picture_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        pictures.main(["gone.png", "-o", str(tmp_path)])
    assert stop.value.code == 2
    assert "circuit.png" in capsys.readouterr().err
