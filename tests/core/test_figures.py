"""What figures say of themselves: titles, metrics, the data's own range; pages and notebooks in place of many panels."""

from __future__ import annotations

import builtins
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from graphlens import HookedTransformer, InputError, RuntimeUnavailable, drift
from graphlens.patching import SweepResult
from graphlens.views import View, progress

LABELS = {
    "metric": ["logit difference", "KL divergence"],
    "layer": ["L0", "L1", "L2"],
    "pos": ["a", "b"],
    "head": ["H0", "H1", "H2", "H3"],
    "key": ["k0", "k1", "k2", "k3", "k4", "k5", "k6"],
}


def result(*axes: str, **changes: object) -> SweepResult:
    shape = [len(LABELS[axis]) for axis in axes]
    values = np.random.default_rng(len(axes)).uniform(1.0, 3.0, shape)
    given = {"baselines": {"corrupted": 0.5}, "metadata": {"model": "tiny $x$", "metrics": ["logit difference"]}}
    return SweepResult(values, axes, {axis: LABELS[axis] for axis in axes}, **{**given, **changes})  # type: ignore[arg-type]


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="the [view] extra is not in this environment"
)
def test_a_figure_of_matplotlib_says_what_it_shows() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(RuntimeUnavailable, match="matplotlib"):
            result("layer", "head").plot(backend="matplotlib")
        return
    found = result("layer", "pos", "head").sel(pos="b")
    figure = found.plot(backend="matplotlib")
    assert figure.get_suptitle() == "tiny $x$: logit difference at pos b"
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("head", "layer")
    bar = figure.axes[1]
    assert bar.get_ylabel() == "logit difference"
    np.testing.assert_allclose(bar.get_ylim(), [found.values.min() - 0.5, found.values.max() - 0.5])
    assert [tick.get_text() for tick in bar.get_yticklabels()] == [
        f"{found.values.min():.4g}",
        f"{found.values.max():.4g}",
    ]
    both = result("metric", "layer", "head", baselines={"corrupted": np.array([0.5, 2.0])})
    figure = both.plot(backend="matplotlib")
    assert [axes.get_ylabel() for axes in figure.axes[2:]] == ["logit difference", "KL divergence"]
    assert figure.get_suptitle() == "tiny $x$: logit difference, KL divergence"
    # The second metric has values on both sides of its baseline, which is marked.
    assert len(figure.axes[3].get_yticklabels()) == 3


def test_a_figure_of_plotly_says_what_it_shows() -> None:
    if importlib.util.find_spec("plotly") is None:
        with pytest.raises(RuntimeUnavailable, match="plotly"):
            result("layer", "head").plot(backend="plotly")
        return
    found = result("layer", "head")
    figure = found.plot(backend="plotly")
    assert figure.layout.title.text == "tiny $x$: logit difference"
    heat = figure.data[0]
    assert heat.colorbar.title.text == "logit difference"
    np.testing.assert_allclose([heat.zmin, heat.zmax], [found.values.min() - 0.5, found.values.max() - 0.5])
    # Nothing is below the baseline, so no colour of the scale is blue; the most is the darkest red.
    assert heat.colorscale[-1] == (1.0, "rgb(178, 24, 43)")
    red, green, blue = (int(part) for part in heat.colorscale[0][1][4:-1].split(","))
    assert red > green
    assert red > blue


def test_many_axes_ask_which_or_become_sliders(tmp_path: Path) -> None:
    found = result("layer", "pos", "head", "key")
    assert found.sel(layer=0).plot(tmp_path / "few.txt") is None
    labels = {**found.labels, "pos": [str(i) for i in range(9)]}
    many = SweepResult(np.zeros((3, 9, 4, 7)), found.axes, labels)
    with pytest.raises(
        InputError, match=r"layer \(3\), pos \(9\), head \(4\), key \(7\), .* 27 panels .* sel\(layer=0, pos=0\)"
    ):
        many.plot()
    view = many.plot(tmp_path / "map.html")
    assert isinstance(view, View)
    page = (tmp_path / "map.html").read_text(encoding="utf-8")
    assert "plotly" not in page.lower()
    assert len(page) < 60_000
    with pytest.raises(InputError, match="cannot be written"):
        many.plot(tmp_path / "no" / "map.html")


# Notebooks


class Shown:
    """What Jupyter's display was given."""

    def __init__(self) -> None:
        self.html: list[str] = []

    def display(self, html: str, display_id: bool) -> Shown:
        assert display_id is True
        self.html.append(html)
        return self

    def update(self, html: str) -> None:
        self.html.append(html)


@pytest.fixture
def jupyter(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """A stand-in for IPython with a kernel; tests/pages/notebooks runs the real ones."""
    shown = Shown()
    display = types.SimpleNamespace(display=shown.display, HTML=str)
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell, display=display))
    return shown


def test_a_terminals_ipython_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    assert progress.notebook() is None
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))
    assert progress.notebook() is None
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: builtins))
    assert progress.notebook() is None


def test_a_bar_shows_in_jupyter_without_ipywidgets(jupyter: Shown) -> None:
    with progress.steps("patching <all>", 3) as steps:
        for _ in range(3):
            steps.advance()
    assert '<progress max="3" value="0">' in jupyter.html[0]
    assert "patching &lt;all&gt;" in jupyter.html[0]
    assert '<progress max="3" value="3"></progress> 3 of 3' in jupyter.html[-2]
    assert jupyter.html[-1] == ""
    with progress.spinner("exporting"):
        assert "exporting <progress></progress>" in jupyter.html[-1]
    assert jupyter.html[-1] == ""


def test_a_bar_is_drawn_a_few_times_a_second(jupyter: Shown) -> None:
    with progress.steps("many", 10_000) as steps:
        for _ in range(10_000):
            steps.advance()
    assert len(jupyter.html) < 30
    assert "10,000 of 10,000" in jupyter.html[-2]


def test_a_sweep_shows_its_progress_in_jupyter(jupyter: Shown) -> None:
    from graphlens.metrics import LogitDiff
    from graphlens.patching import act_patch_sites, sweep

    model = HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
    _, cache = model.run_with_cache([[1, 2, 3, 4]])
    sites = act_patch_sites(model, [[1, 5, 3, 4]], "resid_pre")
    sweep(model, [[1, 5, 3, 4]], sites, cache, LogitDiff(3, 4))
    assert any("<progress" in html for html in jupyter.html)
    assert jupyter.html[-1] == ""


def test_a_plot_in_a_notebook_is_a_view_with_sliders(jupyter: Shown, capsys: pytest.CaptureFixture[str]) -> None:
    view = result("layer", "pos", "head").plot()
    assert isinstance(view, View)
    assert view.data["axes"] == ["layer", "pos", "head"]
    assert capsys.readouterr().out == ""
    assert result("layer", "head").plot(backend="terminal") is None
    assert "layer" in capsys.readouterr().out


def test_a_drift_plots_in_a_notebook_too(jupyter: Shown, tiny: HookedTransformer) -> None:
    assert isinstance(drift(tiny, tiny, [[1, 2, 3]], verbose=False).plot(), View)


def test_a_bar_shows_in_marimo(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []

    class Bar:
        def __init__(self, **given: object) -> None:
            told.append(given)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            told.append("end")

        def update(self, increment: int) -> None:
            told.append(increment)

    status = types.SimpleNamespace(progress_bar=Bar, spinner=Bar)
    monkeypatch.setitem(sys.modules, "marimo", types.SimpleNamespace(running_in_notebook=lambda: True, status=status))
    with progress.steps("patching", 5) as steps:
        steps.advance(2)
        steps.advance(3)
    with progress.spinner("exporting"):
        pass
    bar, spinner = (
        {"title": "patching", "remove_on_exit": True, "total": 5},
        {"title": "exporting", "remove_on_exit": True},
    )
    assert told == [bar, 2, 3, "end", spinner, "end"]
