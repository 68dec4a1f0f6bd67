"""The pictures of README and docs are those that the tools make, each page has one, and a drawing is of what there is."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from graphlens import Ablate, HookedEncoder, HookedTransformer, HookedViT
from tools import diagrams, page_charts, pictures
from tools.site.checks import without_pictures
from tools.site.staging import wants_picture

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/tutorials").glob("*.py"))]


def test_the_pictures_are_those_that_the_script_makes() -> None:
    assert {path.name for path in pictures.FOLDER.iterdir()} == set(pictures.NAMES)
    for name in pictures.NAMES:
        if name not in pictures.DRAWN:
            assert (pictures.FOLDER / name).read_bytes().startswith(b"\x89PNG\r\n")


def test_every_picture_is_shown_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs/tutorials").glob("*.py")]
    shown = {name for page in pages for name in re.findall(r"pictures/([\w.-]+)", page.read_text(encoding="utf-8"))}
    assert shown == {path.name for path in pictures.FOLDER.iterdir()}


@pytest.mark.parametrize("page", [path for path in PAGES if wants_picture(path.name)], ids=lambda path: path.name)
def test_every_page_that_explains_has_a_picture_and_words_for_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", text)
    by_cells = page.suffix == ".py" and (
        "views." in text or "graphlens.drift(" in text
    )  # the built site is looked at too
    assert shown or by_cells, f"{page.name} shows no picture: see tools/pictures.py"
    assert [path for words, path in shown if not words.strip()] == []


def test_a_page_that_shows_no_picture_is_found_in_the_built_site(tmp_path: Path) -> None:
    for name, text in {
        "index.html": '<img src="a.png" alt="What it shows"><img src="b.png" alt=" ">',
        "bare/index.html": "<h1>Words alone</h1><svg></svg>",
        "tutorials/run/index.html": '<iframe src="x.html" title="What the cell shows"></iframe>',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert without_pictures(tmp_path, ["index.md", "bare.md", "tutorials/run.md"]) == [
        "index.md: no words stand for the picture b.png",
        "bare.md: shows no picture",
    ]


def parts(text: str) -> tuple[list[str], list[float]]:
    """A drawing without its numbers, and its numbers."""
    number = r"(?<![\w#])-?\d+\.?\d*(?:e-?\d+)?"
    return re.split(number, text), [float(found) for found in re.findall(number, text)]


@pytest.mark.parametrize("name", pictures.DRAWN)
def test_a_drawing_is_not_stale_and_loads_nothing(name: str) -> None:
    text = (pictures.FOLDER / name).read_text(encoding="utf-8")
    (words, numbers), (now, found) = parts(text), parts(pictures.DRAWN[name]())
    assert words == now, f"run python -m tools.pictures {name}"
    # What a run gives may differ in its last bits from machine to machine, and so in the last digit shown.
    np.testing.assert_allclose(numbers, found, rtol=0, atol=0.011, err_msg=f"run python -m tools.pictures {name}")
    assert len(text) < 60_000
    root = ElementTree.fromstring(text)
    assert root.get("aria-label")
    assert not [value for item in root.iter() for name, value in item.attrib.items() if name.endswith(("href", "src"))]


@pytest.mark.parametrize("page", ["faults", "benchmarks-sweeps", "models"])
def test_a_chart_changes_with_its_table(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (page_charts.DOCS / f"{page}.md").read_text(encoding="utf-8")
    changed = {
        "faults": ("| bake | 19 | 19 | 18 | 0 | 1 |", "| bake | 19 | 19 | 9 | 0 | 10 |"),
        "benchmarks-sweeps": ("| 0.18x | 0.18x |", "| 0.28x | 0.28x |"),
        "models": ("| bloom | 58 | 3.3e-07", "| bloom | 58 | 9.3e-07"),
    }[page]
    assert changed[0] in text
    (tmp_path / f"{page}.md").write_text(text.replace(*changed), encoding="utf-8")
    before = page_charts.CHARTS[f"{page}.svg"]()
    monkeypatch.setattr(page_charts, "DOCS", tmp_path)
    after = page_charts.CHARTS[f"{page}.svg"]()
    assert not (parts(before)[0] == parts(after)[0] and np.allclose(parts(before)[1], parts(after)[1], atol=0.011))


def test_a_chart_has_each_row_of_its_table_once() -> None:
    """Counted in the page's lines, which the chart's own reader of tables has no part in."""
    lines = (page_charts.DOCS / "benchmarks-peers.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if re.search(r"\| [\d.]+x \| [\d.]+x \|", line)]
    assert page_charts.CHARTS["benchmarks-peers.svg"]().count('r="5" fill-opacity') == len(rows) > 100


def test_the_names_of_transformerlens_are_those_that_its_page_counts() -> None:
    text = (page_charts.DOCS / "transformerlens.md").read_text(encoding="utf-8")
    same, different, absent = map(int, re.findall(r"(\d+) names are the same, (\d+) differ, (\d+) are absent", text)[0])
    modules = len(re.findall(r"^\| ", text.partition("### Modules that are absent")[2], re.M)) - 1
    drawn = re.findall(r'class="says">([\d,]+)</text>', page_charts.CHARTS["transformerlens.svg"]())
    assert sum(int(each.replace(",", "")) for each in drawn) == same + different + absent - modules


def test_the_drawings_of_other_models_name_hook_points_that_those_have(tmp_path: Path) -> None:
    from tests.adopt.checkpoints import checkpoint_of
    from tests.adopt.torch_routes import legacy
    from tests.families.encoders import hooked_of

    encoder = HookedEncoder.from_onnx(hooked_of("bert", tmp_path))
    assert {name for names, _, _ in diagrams.ENCODER for name in names} <= set(encoder.hook_points())
    legacy("vit", checkpoint_of("vit", tmp_path), tmp_path / "vit.onnx")
    vision = HookedViT.from_onnx(tmp_path / "vit.onnx", adopt=True)
    assert {name for name, _ in diagrams.VISION} <= set(vision.hook_points())


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
