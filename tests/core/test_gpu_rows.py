"""What ``python -m tests.gpu`` compares, tried on the CPU against itself: every row runs, and what falls to the CPU is seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphlens import surgery
from graphlens.pipelines.hub import embedded_model
from graphlens.runtime import operators, sessions
from tests.gpu.__main__ import apart, rows_of
from tests.gpu.placed import CPU, CUDA, fallen, placed, tokens_of


def test_every_row_runs_and_the_last_sees_that_all_fell_to_the_cpu(tmp_path: Path) -> None:
    rows = list(rows_of("tiny-gpt2", tmp_path, device="cpu"))
    assert len(rows) == 12
    for what, difference, allowed in rows[:-1]:
        assert difference <= allowed, what
    what, fell, allowed = rows[-1]
    assert fell > allowed == 0
    assert "MatMul" in what
    assert "Shape" not in what


def test_the_profile_says_which_provider_ran_an_operator(tmp_path: Path) -> None:
    found = placed(embedded_model("tiny-gpt2") / "model.onnx", {"input_ids": tokens_of(50, 1, 3)}, [CPU], tmp_path)
    assert found["MatMul"] == {CPU}
    assert fallen({**found, "MatMul": {CUDA}, "Shape": {CPU}}) == sorted(set(fallen(found)) - {"MatMul"})


def test_how_far_apart_arrays_are() -> None:
    masked = np.array([1.0, -np.inf, 4.0])
    assert apart(masked, masked) == 0
    assert apart(masked + np.array([0, 0, 2]), masked) == 0.5
    assert apart([1.0, 2.0, 4.0], masked) == float("inf")
    assert apart([1.0], [1.0, 1.0]) == float("inf")


def test_a_graph_that_calls_python_runs_on_the_cpu_whatever_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "choose_providers", lambda asked: ([CUDA, CPU], True))
    graph = surgery.with_python_gates(surgery.load(embedded_model("tiny-gpt2")), ["hook_embed"])
    proto = ir.to_proto(graph)
    with pytest.warns(UserWarning, match="runs with Python hooks are made on the CPU"):
        session = sessions.open_session(
            proto.SerializeToString(), "cuda", embedded_model("tiny-gpt2"), operators.callback_library()
        )
    assert session.providers == [CPU]
