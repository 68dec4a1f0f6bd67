"""A sweep's result in other programs' tables: what pandas and xarray read is what it holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from graphlens.analysis.result import SweepResult

LABELS = {
    "metric": ["a", "b"],
    "layer": ["0", "1", "2"],
    "pos": [" café", 'a "quoted", one', "two\nlines", "=1+1", ""],
}


def result() -> SweepResult:
    values = np.random.default_rng(2).normal(size=(2, 3, 5)) * 1e-7
    values[0, 1, 2], values[1, 0, 0] = np.nan, np.inf
    baselines = {"clean": np.array([1.0, 2.0]), "corrupted": None}
    return SweepResult(values, ("metric", "layer", "pos"), LABELS, baselines)


def test_csv_is_what_pandas_writes_and_reads(tmp_path: Path) -> None:
    frame = result().to_dataframe()
    path = result().to_csv(tmp_path / "values.csv")
    assert path == tmp_path / "values.csv"
    by_pandas = tmp_path / "pandas.csv"
    frame.to_csv(by_pandas, index=False)
    read, again = (pd.read_csv(each, dtype=str, keep_default_na=False) for each in (path, by_pandas))
    pd.testing.assert_frame_equal(read, again)
    values = [float(text or "nan") for text in read.pop("value")]
    np.testing.assert_array_equal(values, frame.pop("value"))
    assert read.to_dict("list") == frame.to_dict("list")


def test_xarray_has_the_axes_labels_and_baselines() -> None:
    found = result().to_xarray()
    assert isinstance(found, xr.DataArray)
    assert found.dims == ("metric", "layer", "pos")
    np.testing.assert_array_equal(found.values, result().values)
    assert {name: list(found.coords[name].values) for name in found.dims} == LABELS
    assert float(found.sel(metric="b", layer="2", pos="=1+1")) == result().values[1, 2, 3]
    np.testing.assert_array_equal(found.attrs["clean"], [1.0, 2.0])
    assert "corrupted" not in found.attrs
    found.values[0, 0, 0] = 9
    assert result().values[0, 0, 0] != 9


def test_a_single_number_is_a_table_too(tmp_path: Path) -> None:
    one = SweepResult(np.asarray(0.25), (), {})
    assert one.to_csv(tmp_path / "one.csv").read_text() == "value\n0.25\n"
    assert float(one.to_xarray()) == 0.25


def test_the_same_labels_twice_stay_two() -> None:
    twice = SweepResult(np.arange(3.0), ("pos",), {"pos": [" the", " the", "x"]})
    np.testing.assert_array_equal(twice.to_xarray().sel(pos=" the").values, [0, 1])


def test_a_table_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        result().to_csv(tmp_path / "no" / "values.csv")
