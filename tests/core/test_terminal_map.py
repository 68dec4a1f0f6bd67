"""Maps in a terminal: numbers that read without colour, labels that stay apart, and a line that says what blank cells are."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from graphlens.analysis.result import SweepResult
from graphlens.views.panels import panels
from graphlens.views.terminal_map import HeatMap, Scale, style_at

few = settings(max_examples=150, deadline=None, derandomize=True, database=None, phases=[Phase.generate])


def result(values: Any, corrupted: Any = 0.0, **labels: list[str]) -> SweepResult:
    array = np.asarray(values, float)
    axes = tuple(labels) or ("layer", "head")[-array.ndim :]
    named = labels or {axis: [str(i) for i in range(size)] for axis, size in zip(axes, array.shape, strict=True)}
    return SweepResult(array, axes, named, {"corrupted": corrupted})


def lines(found: SweepResult, width: int = 60, **console: Any) -> list[str]:
    out = StringIO()
    Console(file=out, width=width, color_system=None, **console).print(HeatMap(found))
    return out.getvalue().splitlines()


def test_cells_hold_the_numbers_and_those_at_the_baseline_are_blank() -> None:
    drawn = lines(result([[-0.5, 0, 1.034], [np.nan, 0.004, np.inf]]))
    assert drawn == [
        "layer head →",
        "          0     1     2",
        "0     -0.50        1.03",
        "1         ·         inf",
        "from -0.5 to 1.034; blank: 0 (unpatched); · not computed yet",
    ]
    moved = lines(result(np.array([[-0.5, 0, 1.034]]) + 10, corrupted=10))
    assert moved[-2:] == ["0      9.50       11.03", "from 9.5 to 11.03; blank: 10 (unpatched)"]
    unknown = lines(result([[0, 2.0]], None))
    assert unknown[-1] == "from 0 to 2; blank: 0", "nothing is called unpatched where no run was made without a patch"
    assert lines(result([[1, 2.0]], 0.0))[-1] == "from 1 to 2; unpatched: 0"
    assert lines(result([[np.nan]], None))[-1] == "· not computed yet"


def test_no_cell_is_blank_that_would_read_otherwise_than_the_baseline() -> None:
    values = np.linspace(-1, 1, 401)[None]
    drawn = lines(result(values), 4000)[2][6:]
    cells = [drawn[at : at + 5].strip() for at in range(0, len(drawn) + 5, 6)][: values.size]
    cells += [""] * (values.size - len(cells))
    for value, cell in zip(values[0], cells, strict=True):
        assert float(cell or 0) == pytest.approx(value, abs=0.0051)
        assert bool(cell) == (abs(float(f"{value:.2f}")) > 0)


@pytest.mark.parametrize("power", [-300, -9, -4, 0, 3, 9, 300])
def test_numbers_of_any_size_have_two_digits_and_a_unit(power: int) -> None:
    drawn = lines(result([[1.0 * 10.0**power, -2.5 * 10.0**power, 0]]))
    cells = drawn[2].split()[1:]
    unit = re.search(r"in units of (1e-?\d+)", drawn[-1])
    factor = float(unit.group(1)) if unit else 1.0
    assert [float(cell) * factor for cell in cells] == pytest.approx([10.0**power, -2.5 * 10.0**power])
    assert max(map(len, cells)) <= 6
    assert (unit is None) == (power in (0, 3))


def test_small_differences_from_a_large_baseline_are_shown_as_differences() -> None:
    drawn = lines(result(10 + np.array([[0, 3e-5, -1e-5]]), 10.0))
    assert drawn[2].split() == ["0", "3.0", "-1.0"]
    assert drawn[-1].startswith("differences from 10; in units of 1e-5; from -1 to 3; ")


@few
@given(
    st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=8),
    st.floats(-1e3, 1e3, allow_subnormal=False),
)
def test_what_a_scale_writes_is_the_value_to_a_fortieth_of_the_span(values: list[float], baseline: float) -> None:
    array = np.asarray(values)
    (panel,) = panels(result(array[None], baseline))
    scale = Scale.of(array, panel.span)
    if float(np.abs(array).max()) > 1e3 * panel.span:
        return  # these are shown as differences
    for value in values:
        read = float(scale.text(value)) * 10.0**scale.power
        assert abs(read - value) <= panel.span / 40 * (1 + 1e-9) + 1e-300


@pytest.mark.parametrize("width", [12, 30, 57, 80, 100, 200])
def test_what_does_not_fit_goes_below(width: int) -> None:
    values = np.arange(1, 3 * 40 + 1.0).reshape(3, 40)
    tall = [f"row {i}" for i in range(3)]
    drawn = lines(result(values, 0.0, layer=tall, head=[f"column {i}" for i in range(40)]), width)
    assert max(map(len, drawn)) <= width
    numbers = [int(word) for line in drawn[1:-1] for word in re.findall(r"(?<=\s)\d+(?=\s|$)", line)]
    assert set(map(int, values.ravel())) <= set(numbers)


def test_rows_and_columns_are_exchanged_where_that_fits() -> None:
    tokens = [f" word{i}_{i}" for i in range(15)]
    drawn = lines(result(np.ones((4, 15)), 0.0, layer=list("0123"), pos=tokens), 80)
    assert drawn[0] == "pos        layer →"
    assert len(drawn) == 2 + 15 + 1
    assert [line.split()[0] for line in drawn[2:-1]] == [f"␣word{i}_{i}" for i in range(15)]
    wide = lines(result(np.ones((4, 15)), 0.0, layer=list("0123"), pos=tokens), 200)
    assert wide[0].startswith("layer pos →")
    values = np.arange(60.0).reshape(4, 15)
    turned, straight = (
        [line.split()[1:] for line in lines(result(values, -1.0, layer=list("0123"), pos=tokens), width)[2:-1]]
        for width in (80, 200)
    )
    assert [list(row) for row in zip(*turned, strict=True)] == straight


def test_labels_are_cut_in_the_middle_and_escaped() -> None:
    names = ["a" * 50 + "_1", "a" * 50 + "_2", " b", "\t", "[bold]x[/]", "東京都庁舎前の駅_12"]
    drawn = lines(result(np.ones((6, 2)), 0.0, pos=names, head=["h" * 30 + "0", "h" * 30 + "1"]), 60)
    labels = [line.split()[0] for line in drawn[2:-1]]
    assert labels == ["aaaaaaaa…aaaaaaa_1", "aaaaaaaa…aaaaaaa_2", "␣b", "\\t", "[bold]x[/]", "東京都庁…前の駅_12"]
    assert drawn[1].split() == ["hhhh…hhhh0", "hhhh…hhhh1"]
    assert max(map(cell_len, drawn)) <= 60
    narrow = lines(result(np.ones((6, 2)), 0.0, pos=names, head=["x", "y"]), 30)
    assert "東京…駅_12" in narrow[-2].replace(" ", "")


def test_colours_diverge_and_text_on_them_can_be_read() -> None:
    def parts(distance: float) -> tuple[list[int], list[int]]:
        text, ground = style_at(distance, 2.0).split(" on ")
        return list(map(int, re.findall(r"\d+", text))), list(map(int, re.findall(r"\d+", ground)))

    def luminance(colour: list[int]) -> float:  # WCAG 2.2
        linear = [c / 12.92 if (c := v / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for v in colour]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    below, above = parts(-2)[1], parts(2)[1]
    assert below[2] > below[0]
    assert above[0] > above[2]
    assert style_at(0.1, 2.0) == "", "small effects are no patches of light on a dark terminal"
    for distance in (sign * size for size in np.linspace(0.3, 3, 31) for sign in (-1, 1)):
        text, ground = map(luminance, parts(float(distance)))
        assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) >= 4.5
    assert parts(9) == parts(2)
    out = StringIO()
    Console(file=out, width=60, color_system="truecolor", force_terminal=True).print(HeatMap(result([[-1, 0, 1]])))
    assert "48;2;214;96;77m" in out.getvalue()


def test_a_terminal_of_ascii_gets_ascii() -> None:
    class Ascii(StringIO):
        encoding = "ascii"

    out = Ascii()
    console = Console(file=out, width=60, color_system=None)
    console.print(HeatMap(result([[1, np.nan]], 0.0, layer=["a" * 40], pos=[" x", "y"])))
    out.getvalue().encode("ascii")
    assert "aaaaaaaa~aaaaaaaaa" in out.getvalue()
