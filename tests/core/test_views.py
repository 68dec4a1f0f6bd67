"""Views without a browser: the numbers that go into a page, what notebooks are given, and what is not installed."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import graphlens
from graphlens import HookedTransformer, InputError, RuntimeUnavailable, UnknownHookPoint, views
from graphlens.attribution import direct_logit_attribution, edge_attribution
from graphlens.metrics import LogitDiff
from graphlens.patching import Site, SweepResult, sweep
from graphlens.views import progress
from graphlens.views.encoded import cell, floats, packed, packed_size
from graphlens.views.pages import KINDS, asset, in_notebook
from graphlens.views.terminal_map import HeatMap

PROMPT = "When John and Mary went to the store, John gave a drink to"
CORRUPTED = "When John and Mary went to the store, Mary gave a drink to"


def decoded(item: Any) -> np.ndarray:
    return np.frombuffer(base64.b64decode(item["b"]), f"<{item['t']}")


@pytest.mark.parametrize("kind", ["f4", "f8"])
def test_arrays_go_into_a_page_bit_for_bit(kind: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=1000).astype(kind) * 10.0 ** rng.integers(-30, 30, 1000).astype(kind)
    values[:4] = [np.nan, np.inf, -np.inf, -0.0]
    made = packed(values, kind)
    assert decoded(made).tobytes() == values.tobytes()
    assert packed_size(1000, kind) <= len(made["b"]) <= packed_size(1000, kind) + 4  # type: ignore[arg-type]


def test_cells_of_tables() -> None:
    given = [None, "a", True, np.bool_(False), 3, np.int64(-4), 2**60, 1.5, np.float32(0.5), np.nan, -np.inf, [1], b"x"]
    wanted = [None, "a", "True", "False", 3, -4, str(2**60), 1.5, 0.5, {"n": "nan"}, {"n": "-inf"}, "[1]", "b'x'"]
    assert [cell(value) for value in given] == wanted


def test_numbers_of_half_precision_are_taken() -> None:
    import ml_dtypes

    for dtype in (np.float16, ml_dtypes.bfloat16):
        found = floats(np.array([1.5, -2.0], dtype), "x")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, [1.5, -2.0])
    assert floats(np.array([1, 2]), "x").dtype == np.float64
    with pytest.raises(InputError, match="x must be real numbers"):
        floats(["a"], "x")


def test_what_shows_itself_in_a_notebook(tiny: HookedTransformer) -> None:
    _, cache = tiny.run_with_cache(PROMPT)
    metric = LogitDiff(" Mary", " John")
    found = sweep(tiny, CORRUPTED, [Site("z", 1, head=2), Site("resid_pre", 2)], cache, metric, verbose=False)
    drift = graphlens.drift(tiny, tiny, PROMPT, verbose=False)
    shown = {
        "HookedTransformer": tiny,
        "HookedTransformerConfig": tiny.cfg,
        "hook_points": tiny.hook_points(),
        "ActivationCache": cache,
        "SweepResult": found,
        "edges": edge_attribution(tiny, CORRUPTED, cache, metric),
        "components": direct_logit_attribution(tiny, PROMPT, metric),
        "DriftResult": drift,
        "a view": views.attention(cache, PROMPT),
        "a report": views.report([cache, found]),
    }
    for name, item in shown.items():
        text = item._repr_html_()
        assert text.startswith("<iframe "), name
        page = html.unescape(re.search(r'srcdoc="(.*?)"', text, re.S)[1])  # type: ignore[index]
        assert page.startswith("<!DOCTYPE html>"), name
        assert '"' not in text.partition('srcdoc="')[2].partition('"')[0]


def test_a_result_chooses_how_it_is_shown(tiny: HookedTransformer) -> None:
    def result(*axes: str) -> SweepResult:
        return SweepResult(np.zeros([3] * len(axes)), axes, {axis: ["embed->logits"] * 3 for axis in axes})

    assert result("edge").view().kind == "circuit"
    assert result("component").view().kind == "bars"
    for axes in (("a", "b"), ("metric", "a", "b"), ("a", "b", "c", "d"), ("metric", "a")):
        view = result(*axes).view()
        assert view.kind == "heat"
        assert (view.data["rows"], view.data["columns"]) == axes[-2:]
    view = result("a", "b", "c").view(rows="c", columns="a")
    assert (view.data["rows"], view.data["columns"]) == ("c", "a")
    one = result("a", "b").sel(a=0, b=0).view()
    assert (one.kind, one.data["rows"], one.data["columns"]) == ("heat", None, None)


def test_a_view_says_what_was_measured(tiny: HookedTransformer) -> None:
    _, cache = tiny.run_with_cache(PROMPT)
    sites = [Site("z", layer, head=1) for layer in range(4)]
    found = sweep(tiny, CORRUPTED, sites, cache, LogitDiff(" Mary", " John"), verbose=False)
    said = " ".join(found.view().says)
    assert "tiny-gpt2; logit difference." in said
    assert f"clean {found.baselines['clean']:.6g}, corrupted {found.baselines['corrupted']:.6g}" in said


def test_a_cache_that_lacks_something_says_what(tiny: HookedTransformer) -> None:
    _, cache = tiny.run_with_cache(PROMPT, names_filter=lambda name: "hook_z" in name)
    with pytest.raises(InputError, match="no attention patterns"):
        views.attention(cache, PROMPT)
    with pytest.raises(InputError, match="no residual stream"):
        views.lens(cache, PROMPT)
    _, cache = tiny.run_with_cache(PROMPT, names_filter=lambda name: "resid_pre" in name)
    with pytest.raises(UnknownHookPoint, match="hook_resid_post"):
        views.lens(cache, PROMPT)


def test_a_cache_too_large_to_measure_is_listed_all_the_same(
    tiny: HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphlens.views.listing.MOST_BYTES", 1000)
    _, cache = tiny.run_with_cache(PROMPT)
    view = cache.view()
    assert "their statistics were not computed" in view.says[-1]
    rows = view.data["rows"]
    assert isinstance(rows, list)
    assert rows[0][3:] == [None] * 5


def test_what_a_notebook_cannot_be_shown_is_a_sentence() -> None:
    labels = {"a": [str(i) for i in range(1500)], "b": [str(i) for i in range(1500)]}
    assert in_notebook(SweepResult(np.zeros((1500, 1500)), ("a", "b"), labels)).startswith("<p>1500 a x 1500 b are")


def test_a_page_that_would_be_too_large_is_refused() -> None:
    labels = {"a": [str(i) for i in range(1000)], "b": [str(i) for i in range(1000)]}
    one = SweepResult(np.zeros((1000, 1000)), ("a", "b"), labels).view()
    page = views.report([one] * 3)
    with pytest.raises(InputError, match=r"a page of 32 MB would not open well \(24 MB is the most\)"):
        page.html()
    assert page.frame().startswith("<p>a page of 32 MB")


def test_every_kind_of_view_has_its_script_in_the_package() -> None:
    root = Path(graphlens.__file__).parent / "views" / "assets"
    names = ["look.css", "views.css", "core.js", "start.js", "widget.js", *(f"{kind}.js" for kind in KINDS)]
    for name in names:
        text = asset(name)
        assert (root / name).read_text(encoding="utf-8") == text
        assert "innerHTML" not in text
        assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    # What stands between <script> and </script>, or <style> and </style>, may not end it.
    assert not any(re.search(r"</|<!--", asset(name)) for name in names)


def test_a_page_is_the_same_each_time(tiny: HookedTransformer) -> None:
    pages = [views.attention(tiny.run_with_cache(PROMPT)[1], PROMPT).report().html() for _ in range(2)]
    assert pages[0] == pages[1]


def test_views_are_loaded_when_they_are_used() -> None:
    assert set(dir(views)) >= {"attention", "lens", "text", "heat", "bars", "circuit", "drift", "table", "report"}
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        views.atention  # noqa: B018


def test_picking_heads_without_anywidget_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("anywidget") is not None:
        monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(RuntimeUnavailable, match=r"needs anywidget: pip install 'graphlens-onnx\[notebook\]'"):
        views.pick_head({}, ["a"])


def test_a_report_of_one_part_has_its_title(tiny: HookedTransformer) -> None:
    assert views.report(tiny).title.startswith("HookedTransformer('tiny-gpt2': 4 layers")
    assert views.report([tiny.cfg]).title == "HookedTransformerConfig"
    assert views.report([tiny.cfg, tiny.cfg]).title == views.report("words").title == "graphlens report"
    assert views.report([tiny], "mine", "first").title == "mine"
    drift = graphlens.drift(tiny, tiny, PROMPT, verbose=False)
    assert views.report(drift).lead == views.drift(drift).lead != ()


def test_progress_names_paths_that_look_like_markup_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.spinner("Reading a[red] and b[/red]"), progress.steps("Writing c[/red]", 2) as bar:
        bar.advance(2)
    progress.note("d[red] and e[/red]")
    written = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "Reading a[red] and b[/red]" in written
    assert "d[red] and e[/red]" in written


def test_progress_tells_how_many_pass_in_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    for unit, told in (("tokens", True), ("", False)):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.steps("Harvesting", 30, unit) as bar:
            for _ in range(3):
                bar.advance(10)
                time.sleep(0.01)
        assert bool(re.search(r"\d[\d,]* tokens/s", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()))) == told


def test_only_parts_of_a_whole_are_summed_and_only_finite_ones() -> None:
    labels = [f"c{i}" for i in range(4)]
    values = np.array([1.0, np.nan, -3.5, np.inf])
    parts = SweepResult(values, ("component",), {"component": labels}, {"corrupted": 0.0})
    assert parts.view().says[-1] == "Each bar is value; those that are finite, 2 sum to -2.5."
    layers = SweepResult(values[[0, 2]], ("layer",), {"layer": ["0", "1"]}, {"corrupted": 0.5})
    assert layers.view().says[-1] == "Each bar is value."
    assert layers.view().data["adds"] is False


def test_a_baseline_that_is_no_number_is_not_called_the_unpatched_value() -> None:
    for baseline, said in ((0.5, "unpatched"), (np.nan, "0 (the unpatched value is not finite)"), (None, "0")):
        found = SweepResult(np.eye(2), ("a", "b"), {"a": ["x", "y"], "b": ["p", "q"]}, {"corrupted": baseline})
        assert views.heat(found).data["middleName"] == said
        text = io.StringIO()
        Console(file=text, width=80).print(HeatMap(found))
        assert ("unpatched" in text.getvalue()) is (said == "unpatched")


def test_titles_keep_the_spaces_of_other_scripts() -> None:
    page = views.report(["a\u3000b\u00a0c\td", "\u202ee\x00"], title="x").html()
    assert "a\u3000b\u00a0c\td" in page
    assert "\ufffde\ufffd" in page


def test_attention_says_what_its_rows_sum_to(tiny: HookedTransformer) -> None:
    _, cache = tiny.run_with_cache(PROMPT)
    assert views.attention(cache, PROMPT).says[0] == "Attention weights of the run. Each row of a map sums to 1."
    part = views.attention(cache, PROMPT, positions=[3, 5]).says[0]
    assert part.endswith("Each row of a map sums to 1 over all 15 positions, 2 of which are shown.")
    halved = {"blocks.0.attn.hook_pattern": np.asarray(cache["pattern", 0]) * [[[[0.5]]]]}
    assert "sums to between 0.5 and 0.5, and not to 1." in views.attention(halved, PROMPT.split()[:1] * 15).says[0]
    halved["blocks.0.attn.hook_pattern"][:] = np.nan
    assert "No row of a map has a finite sum." in views.attention(halved, PROMPT.split()[:1] * 15).says[0]


def test_a_kind_that_is_markup_stays_text() -> None:
    assert "<img" not in views.View('"><img src=x>', "title", {}).report().html()
