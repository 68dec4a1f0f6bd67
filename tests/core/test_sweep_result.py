"""What a sweep found: selected, ranked, as a table, a frame, a heat map and a file; and what is refused."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
import re
import sys
import types
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rich.console import Console

from graphlens.analysis import result as sweep_result
from graphlens.analysis.result import SweepResult
from graphlens.errors import InputError, RuntimeUnavailable
from graphlens.views import heat_map
from graphlens.views.terminal_map import TEXT_WIDTH

few = settings(max_examples=40, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
RNG = np.random.default_rng(11)
TOKENS = [" café", "Ġ", "\n", "[bold]x[/]", " ", "<b>&", "$a$", "東京都庁舎前の"]
LAYERS = ["0", "1", "2"]
VALUES = RNG.normal(size=(3, 8))
VALUES[1, 6:] = np.nan
VALUES[0, 2] = 9.0


def flat(**changes: Any) -> SweepResult:
    given_values: dict[str, Any] = {
        "values": VALUES,
        "axes": ("layer", "position"),
        "labels": {"layer": LAYERS, "position": TOKENS},
        "baselines": {"clean": 3.5, "corrupted": -0.25},
        "metadata": {"model": "tiny", "hook": "hook_z", "notes": ["a", 1, None]},
    }
    return SweepResult(**{**given_values, **changes})


def deep() -> SweepResult:
    labels = {
        "metric": ["logit difference", "KL divergence"],
        "layer": LAYERS,
        "head": list("01234"),
        "batch": ["a", "b"],
    }
    values = np.random.default_rng(1).normal(size=(2, 3, 5, 2))
    values[1] *= 100
    baselines = {"clean": None, "corrupted": np.array([[0.5, -0.5], [10.0, 20.0]])}
    return SweepResult(values, ("metric", "layer", "head", "batch"), labels, baselines)


def said_on(renderable: Any, width: int = 100) -> str:
    console = Console(record=True, width=width, file=StringIO(), color_system="truecolor", force_terminal=True)
    console.print(renderable)
    return console.export_text(styles=False)


# The record


def test_what_it_holds() -> None:
    given_values, result = VALUES.copy(), flat(values=VALUES.astype(np.float32))
    assert result.shape == (3, 8)
    assert result.values.dtype == np.float64
    np.testing.assert_array_equal(np.asarray(result), VALUES.astype(np.float32))
    assert np.asarray(result, np.float32).dtype == np.float32
    assert np.array(result).flags.writeable
    assert not np.shares_memory(flat(values=given_values).values, given_values)
    with pytest.raises(ValueError, match="read-only"):
        result.values[0, 0] = 1
    assert repr(result) == "SweepResult(layer=3, position=8; 2 values not computed yet)"
    assert repr(deep()) == "SweepResult(metric=2, layer=3, head=5, batch=2)"
    assert flat(baselines={}).baselines == {"clean": None, "corrupted": None}
    assert flat(metadata={"n": np.int64(3), "axes": ("a", "b")}).metadata == {"n": 3, "axes": ["a", "b"]}


def test_equality() -> None:
    assert flat() == flat()
    assert hash(flat()) == hash(flat())
    assert deep() == copy.deepcopy(deep()) == pickle.loads(pickle.dumps(deep()))
    others = (
        flat(values=np.nan_to_num(VALUES)),
        flat(labels={"layer": LAYERS, "position": TOKENS[::-1]}),
        flat(baselines={"corrupted": -0.25}),
        flat(baselines={"clean": 3.5, "corrupted": 0}),
        flat(metadata={}),
        SweepResult(VALUES.T, ("position", "layer"), {"layer": LAYERS, "position": TOKENS}),
    )
    for other in (*others, VALUES.tolist(), None):
        assert flat() != other


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"axes": ("layer",)}, r"shape \[3, 8\], and there are 1 axes"),
        ({"axes": ("layer", "layer")}, "a name of its own"),
        ({"axes": ("layer", "value")}, "'value'"),
        ({"axes": ("layer", "")}, "a name of its own"),
        ({"axes": ("layer", "metric")}, "'metric' comes first"),
        ({"axes": ("batch", "position")}, "'batch' last"),
        ({"labels": {"layer": LAYERS}}, r"labels are given for \['layer'\], and the axes are"),
        ({"labels": {"layer": LAYERS, "head": TOKENS}}, "labels are given for"),
        ({"labels": {"layer": LAYERS[:2], "position": TOKENS}}, "'layer' has 3 entries, and 2 labels"),
        ({"labels": {"layer": [0, 1, 2], "position": TOKENS}}, "labels of axis 'layer' must be text"),
        ({"labels": {"layer": "012", "position": TOKENS}}, "'layer' has 3 entries, and 1 labels"),
        ({"values": VALUES[:, :0]}, r"shape \[3, 0\]"),
        ({"values": VALUES > 0}, "must be real numbers, not bool"),
        ({"values": [[1.0], [1.0, 2.0]]}, "cannot be read"),
        ({"baselines": {"patched": 1}}, r"not \['patched'\]"),
        ({"baselines": {"clean": [1.0, 2.0]}}, r"the clean baseline has shape \[2\]"),
        ({"baselines": {"corrupted": "low"}}, "the corrupted baseline must be real numbers"),
        ({"metadata": {"model": object()}}, "metadata must be what JSON can hold"),
        ({"metadata": {"x": float("nan")}}, "metadata must be what JSON can hold"),
    ],
)
def test_parts_that_do_not_fit(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        flat(**changes)


def test_baselines_have_the_shape_of_metric_and_batch() -> None:
    result = deep()
    assert result.against().shape == (2, 1, 1, 2)
    np.testing.assert_array_equal(result.against()[:, 0, 0], result.baselines["corrupted"])
    np.testing.assert_array_equal(result.against("clean"), 0)
    assert flat().against() == -0.25
    assert flat(baselines={"corrupted": np.nan}).against() == 0
    one = result.sel(batch=0)
    assert one.against().shape == (2, 1, 1)
    with pytest.raises(InputError, match="'patched'"):
        result.against("patched")
    with pytest.raises(InputError, match=r"has shape \[2, 2\]: it is a number, or \[2\]"):
        SweepResult(one.values, one.axes, one.labels, {"clean": result.baselines["corrupted"]})


# Parts of it


def test_sel_is_indexing() -> None:
    result = deep()
    for chosen in ({"metric": 1, "batch": -1}, {"metric": "KL divergence", "batch": "b"}):
        part = result.sel(**chosen)
        np.testing.assert_array_equal(part.values, result.values[1, :, :, 1])
        assert part.axes == ("layer", "head")
        assert part.labels == {"layer": LAYERS, "head": list("01234")}
        assert part.baselines == {"clean": None, "corrupted": 20.0}
        assert part.metadata == {"selected": {"metric": "KL divergence", "batch": "b"}}
    np.testing.assert_array_equal(result.sel(metric=0).baselines["corrupted"], [0.5, -0.5])
    np.testing.assert_array_equal(result.sel(batch=0).baselines["corrupted"], [0.5, 10])
    np.testing.assert_array_equal(result.sel(layer=np.int64(2)).baselines["corrupted"], result.baselines["corrupted"])
    stepwise = result.sel(batch="b").sel(metric=1)
    assert stepwise == result.sel(batch=1, metric=1)
    assert result.sel().values.shape == result.shape
    single = part.sel(layer="2", head=3)
    assert (single.shape, single.axes) == ((), ())
    assert float(single.values) == result.values[1, 2, 3, 1]
    assert flat().sel(position=" café", layer=0).values == VALUES[0, 0]


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"head": 0}, "no axis 'head': the axes are 'layer', 'position'"),
        ({"layer": 3}, "layer=3: the index is outside 0 to 2"),
        ({"layer": -4}, "outside 0 to 2"),
        ({"layer": "3"}, "layer='3': no entry is called so. There are 3: '0', '1', '2'"),
        ({"position": "cafe"}, "There are 8"),
        ({"layer": True}, "a label or an index"),
        ({"layer": slice(2)}, "a label or an index"),
        ({"layer": 1.0}, "a label or an index"),
    ],
)
def test_sel_of_what_is_not_there(chosen: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        flat().sel(**chosen)


def test_a_label_of_several_entries_is_selected_by_index() -> None:
    result = SweepResult([1.0, 2.0, 3.0], ("position",), {"position": [" the", "a", " the"]})
    with pytest.raises(InputError, match=r"entries \[0, 2\]: select one by its index"):
        result.sel(position=" the")
    assert result.sel(position=2).values == 3


def test_top_is_farthest_from_the_corrupted_baseline() -> None:
    result = flat()
    found = result.top(100)
    assert len(found) == 22, "the two that are not computed are left out"
    assert found[0] == ({"layer": "0", "position": "\n"}, 9.0)
    distances = [abs(value + 0.25) for _, value in found]
    assert distances == sorted(distances, reverse=True)
    for labels, value in found:
        assert VALUES[LAYERS.index(labels["layer"]), TOKENS.index(labels["position"])] == value
    assert result.top(3) == found[:3]
    assert len(result.top()) == 10
    unknown = flat(baselines={}).top(100)
    assert [abs(value) for _, value in unknown] == sorted((abs(value) for _, value in unknown), reverse=True)
    assert [label for label, _ in unknown] != [label for label, _ in found]
    per_prompt = SweepResult(
        [[1.0, 9.0]], ("layer", "batch"), {"layer": ["0"], "batch": ["p", "q"]}, {"corrupted": [5, 8]}
    )
    assert per_prompt.top(1) == [({"layer": "0", "batch": "p"}, 1.0)]
    names = [str(i) for i in range(64)]
    tied = SweepResult(np.arange(64) % 2, ("head",), {"head": names})
    assert [labels["head"] for labels, _ in tied.top(64)] == names[1::2] + names[::2], "ties stay in order"
    for wrong in (0, -1, 1.5, True, "3"):
        with pytest.raises(InputError, match="n must be"):
            result.top(wrong)  # type: ignore[arg-type]


# Frames


def test_a_frame_has_a_row_for_each_value(monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = types.SimpleNamespace(DataFrame=dict)
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    result = deep()
    frame = result.to_dataframe()
    assert list(frame) == ["metric", "layer", "head", "batch", "value"]
    assert {len(column) for column in frame.values()} == {60}
    for *labels, value in zip(*frame.values(), strict=True):
        assert result.sel(**dict(zip(result.axes, labels, strict=True))).values == value
    assert np.isnan(flat().to_dataframe()["value"]).sum() == 2
    assert flat().sel(layer=0, position=1).to_dataframe() == {"value": [VALUES[0, 1]]}


def test_a_frame_of_pandas_or_what_to_install() -> None:
    if importlib.util.find_spec("pandas") is None:
        with pytest.raises(RuntimeUnavailable, match=r"graphlens-onnx\[view\]"):
            flat().to_dataframe()
        return
    frame = flat().to_dataframe()
    assert list(frame.columns) == ["layer", "position", "value"]
    assert frame.shape == (24, 3)
    assert frame["value"].isna().sum() == 2
    assert frame.set_index(["layer", "position"]).loc[("0", "\n"), "value"] == 9


# Files


@pytest.mark.parametrize("ending", ["", ".json", ".safetensors"])
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, ending: str) -> None:
    for result in (flat(), deep(), flat().sel(layer=0, position=2), flat(values=np.full((3, 8), np.nan), baselines={})):
        written = result.save(tmp_path / f"ioi.v2{ending}")
        assert written == tmp_path / "ioi.v2.json"
        for name in ("ioi.v2", "ioi.v2.json", "ioi.v2.safetensors"):
            loaded = SweepResult.load(str(tmp_path / name))
            assert loaded == result
            assert list(loaded.labels) == list(result.labels)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ioi.v2.json", "ioi.v2.safetensors"]


@few
@given(st.lists(st.text(), min_size=1, max_size=5), st.lists(st.floats(), min_size=1, max_size=5), st.floats())
def test_any_label_and_any_number_survives(
    tmp_path_factory: pytest.TempPathFactory, labels: list[str], numbers: list[float], baseline: float
) -> None:
    values = np.resize(np.array(numbers), len(labels))
    result = SweepResult(values, ("position",), {"position": labels}, {"clean": baseline}, {"notes": labels})
    assert SweepResult.load(result.save(tmp_path_factory.getbasetemp() / "any")) == result
    said_on(result)
    lines = said_on(heat_map.HeatMap(result), 40).splitlines()
    assert len(lines) == 4  # the axis, its labels, the row, the legend: a newline in a label makes no line


def test_the_same_result_gives_the_same_bytes_and_no_path(tmp_path: Path) -> None:
    for name, metadata in (("a", {"x": 1, "y": 2}), ("b", {"y": 2, "x": 1})):
        (tmp_path / name).mkdir()
        flat(metadata=metadata).save(tmp_path / name / "r.json")
    for ending in ("json", "safetensors"):
        first, second = ((tmp_path / name / f"r.{ending}").read_bytes() for name in "ab")
        assert first == second
        assert str(tmp_path).encode() not in first
    (tmp_path / "a" / "r.json").rename(tmp_path / "moved.json")
    (tmp_path / "a" / "r.safetensors").rename(tmp_path / "moved.safetensors")
    assert SweepResult.load(tmp_path / "moved") == flat(metadata={"x": 1, "y": 2})


def test_a_save_that_fails_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat().save(tmp_path / "r")

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="no space left"):
        deep().save(tmp_path / "r")
    monkeypatch.undo()
    assert SweepResult.load(tmp_path / "r") == flat()
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(InputError, match="cannot be written"):
        flat().save(tmp_path / "no" / "folder")
    with pytest.raises(InputError, match="the path is empty"):
        flat().save("")


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE = {
    "no json": (lambda j, s: j.unlink(), r"r\.json: no such file"),
    "no arrays": (lambda j, s: s.unlink(), r"r\.safetensors: no such file"),
    "cut json": (lambda j, s: j.write_bytes(j.read_bytes()[:-9]), "damaged"),
    "binary json": (lambda j, s: j.write_bytes(b"\xff\xfe\x00"), "damaged"),
    "a list": (lambda j, s: j.write_text("[1]"), "not the result of a sweep"),
    "another format": (lambda j, s: edited(j, format="graphlens.interventions"), "not the result of a sweep"),
    "newer": (lambda j, s: edited(j, version=2), "version 2, and this graphlens reads up to 1"),
    "no version": (lambda j, s: edited(j, version=None), "version None"),
    "cut arrays": (lambda j, s: s.write_bytes(s.read_bytes()[:-8]), "digest differs"),
    "one byte": (lambda j, s: s.write_bytes(s.read_bytes()[:-1] + b"\x01"), "digest differs"),
    "arrays of another save": (
        lambda j, s: s.write_bytes(deep().save(j.with_name("o")).with_suffix(".safetensors").read_bytes()),
        "digest",
    ),
    "other labels": (lambda j, s: edited(j, labels={"layer": ["0"], "position": TOKENS}), "3 entries, and 1 labels"),
    "labels are none": (lambda j, s: edited(j, labels=None), "damaged"),
    "axes are a number": (lambda j, s: edited(j, axes=3), "damaged"),
    "other axes": (lambda j, s: edited(j, axes=["layer"]), "damaged"),
    "no digest": (lambda j, s: edited(j, safetensors_sha256=None), "digest differs"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_told(tmp_path: Path, name: str) -> None:
    damage, said = DAMAGE[name]
    written = flat().save(tmp_path / "r")
    damage(written, tmp_path / "r.safetensors")
    with pytest.raises(InputError, match=said) as caught:
        SweepResult.load(written)
    assert str(tmp_path) in str(caught.value)


def test_arrays_that_are_none_are_told(tmp_path: Path) -> None:
    import hashlib

    written = flat().save(tmp_path / "r")
    (tmp_path / "r.safetensors").write_bytes(b"not tensors")
    edited(written, safetensors_sha256=hashlib.sha256(b"not tensors").hexdigest())
    with pytest.raises(InputError, match="damaged, it cannot be read"):
        SweepResult.load(written)


# Tables


def test_a_table_of_two_axes_is_rows_by_columns() -> None:
    text = said_on(flat())
    lines = [line for line in text.splitlines() if re.match(r"\s*[012]\s", line)]
    assert [line.split()[0] for line in lines] == LAYERS
    for line, row in zip(lines, VALUES, strict=True):
        assert line.split()[1:] == ["·" if np.isnan(value) else f"{value:.4g}" for value in row]
    for name in ("layer", "␣café", "Ġ", r"\n", "[bold]x[/]", "<b>&", "$a$", "東京都庁舎前の"):
        assert name in text
    for note in ("across: position", "clean 3.5", "corrupted -0.25", "· not computed yet"):
        assert note in text
    assert "not computed" not in said_on(deep())


def test_tables_of_other_numbers_of_axes() -> None:
    text = said_on(deep())
    row = next(line for line in text.splitlines() if re.match(r"\s*KL divergence\s+2\s+4 ", line))
    assert row.split()[-2:] == [f"{value:.4g}" for value in deep().values[1, 2, 4]]
    assert len(re.findall("KL divergence", text)) == 15
    one = said_on(flat().sel(layer=1))
    assert re.search(rf"␣café\s+{re.escape(f'{VALUES[1, 0]:.4g}')}", one)
    assert re.search(r"\$a\$\s+·", one)
    none = said_on(flat().sel(layer=0, position=2))
    assert "value" in none
    assert re.search(r"\s9\s", none)


def test_a_large_table_says_what_it_leaves_out() -> None:
    size = (sweep_result.MAX_ROWS + 7, sweep_result.MAX_COLUMNS + 5)
    labels = {"layer": [f"r{i}" for i in range(size[0])], "position": [f"c{i}" for i in range(size[1])]}
    text = said_on(SweepResult(np.zeros(size), ("layer", "position"), labels), 120)
    assert "7 more rows and 5 more columns" in " ".join(text.split())
    assert f"r{sweep_result.MAX_ROWS - 1} " in text
    assert f"r{sweep_result.MAX_ROWS} " not in text


# Heat maps


def test_one_panel_for_each_leading_index() -> None:
    found = heat_map.panels(deep().sel(batch=1))
    assert [panel.title for panel in found] == ["logit difference", "KL divergence"]
    for panel, values, centre in zip(found, deep().values[..., 1], (-0.5, 20.0), strict=True):
        np.testing.assert_array_equal(panel.values, values)
        assert panel.centre == centre
        assert panel.span == np.abs(values - centre).max()
        np.testing.assert_allclose(panel.distance, values - centre)
        assert (panel.row_axis, panel.column_axis) == ("layer", "head")
    every = heat_map.panels(deep())
    assert [panel.title for panel in every[2:4]] == ["logit difference, layer 2", "KL divergence, layer 0"]
    assert {panel.span for panel in every[:3]} == {np.abs(deep().values[0] - [0.5, -0.5]).max()}, "one scale a metric"
    assert every[0].centre is None
    assert every[0].scale()[1] == "baseline"
    np.testing.assert_allclose(every[3].distance, deep().values[1, 0] - [10, 20])
    one = heat_map.panels(deep().sel(batch=0, layer=1))
    assert [panel.values.shape for panel in one] == [(1, 5), (1, 5)], "metrics do not share a panel"
    assert [panel.values.shape for panel in heat_map.panels(flat().sel(layer=0, position=0))] == [(1, 1)]
    text = said_on(heat_map.HeatMap(deep()))
    assert text.count("unpatched") == 6
    assert "logit difference, layer 0\n" in text


# plot


def test_plot_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert flat().plot() is None
    printed = capsys.readouterr().out
    assert "␣café" in printed
    assert "-0.25 (unpatched)" in printed
    assert flat().plot(backend="terminal") is None
    assert capsys.readouterr().out == printed


def test_plot_writes_text(tmp_path: Path) -> None:
    assert flat().plot(tmp_path / "map.TXT") is None
    data = (tmp_path / "map.TXT").read_bytes()
    assert b"\x1b" not in data
    assert b"\r" not in data
    assert b" \n" not in data
    assert data.decode() == said_on(heat_map.HeatMap(flat()), TEXT_WIDTH)
    assert " 9.0 " in data.decode()


@pytest.mark.parametrize(
    ("path", "backend", "said"),
    [
        ("a.jpg", None, r"no plot ends in '.jpg'. There is 'terminal' \(.txt\)"),
        ("a", None, "no plot ends in ''"),
        ("a.png", "seaborn", "no backend 'seaborn'"),
        (None, "Terminal", "no backend 'Terminal'"),
        ("a.png", "terminal", "terminal writes .txt"),
        ("a.html", "matplotlib", "matplotlib writes .png and .svg and .pdf"),
        ("a.png", "plotly", "plotly writes .html"),
        ("no/folder/a.txt", None, "cannot be written"),
    ],
)
def test_plots_that_cannot_be(tmp_path: Path, path: str | None, backend: str | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        flat().plot(path and tmp_path / path, backend=backend)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("ending", "package"), [("png", "matplotlib"), ("svg", "matplotlib"), (None, "plotly")])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str | None, package: str
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    by_file = (tmp_path / f"a.{ending}", None) if ending else (tmp_path / "a.html", package)
    for path, backend in (by_file, (None, package)):
        with pytest.raises(RuntimeUnavailable, match=rf"needs {package}: pip install 'graphlens-onnx\[view\]'"):
            flat().plot(path, backend=backend)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(
        RuntimeUnavailable, match=r"to_dataframe\(\) needs pandas: pip install 'graphlens-onnx\[view\]'"
    ):
        flat().to_dataframe()


@pytest.mark.filterwarnings("ignore:Glyph")  # no font has everything
@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_figures_of_matplotlib(tmp_path: Path, ending: str, start: bytes) -> None:
    path = tmp_path / f"map.{ending}"
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(RuntimeUnavailable, match="matplotlib"):
            flat().plot(path)
        return
    figure = flat().plot(path)
    assert path.read_bytes().startswith(start)
    axes = figure.axes[0]
    drawn = axes.images[0].get_array()
    np.testing.assert_allclose(drawn.filled(np.nan), VALUES + 0.25)
    assert axes.images[0].get_clim() == (-9.25, 9.25)
    assert [tick.get_text() for tick in axes.get_xticklabels()][:3] == ["␣café", "Ġ", r"\n"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == LAYERS
    assert len(deep().sel(batch=0).plot(backend="matplotlib").axes) == 4  # two panels, two colour bars


def test_figures_of_plotly(tmp_path: Path) -> None:
    path = tmp_path / "map.html"
    if importlib.util.find_spec("plotly") is None:
        with pytest.raises(RuntimeUnavailable, match="plotly"):
            flat().plot(path, backend="plotly")
        return
    figure = flat().plot(path, backend="plotly")
    assert "plotly" in path.read_text(encoding="utf-8")
    heat = figure.data[0]
    np.testing.assert_allclose(np.array(heat.z, float), VALUES + 0.25)
    assert heat.z[1][6] is None
    finite = np.clip(VALUES, -9.5, 9)[np.isfinite(VALUES)] + 0.25
    assert (heat.zmin, heat.zmax) == (finite.min(), finite.max())
    assert figure.layout.xaxis.ticktext[5] == "&lt;b&gt;&amp;"
    assert len(deep().sel(batch=0).plot(backend="plotly").data) == 2


@pytest.mark.parametrize("backend", ["matplotlib", "plotly", "terminal"])
def test_too_many_panels_for_a_figure(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib.figure", "plotly.graph_objects", "plotly.subplots"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(Figure=None))
    size = heat_map.MAX_PANELS + 1
    labels = {"layer": [str(i) for i in range(size)], "head": ["0"], "position": ["a", "b"]}
    result = SweepResult(np.zeros((size, 1, 2)), ("layer", "head", "position"), labels)
    said = r"axes layer \(17\), head \(1\), position \(2\), .* 17 panels .* sel\(layer=0\), or .* ends in .html"
    with pytest.raises(InputError, match=said):
        result.plot(backend=backend)
