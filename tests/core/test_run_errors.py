"""What ONNX Runtime raises comes as an error of graphlens that names the graph, what it was given and what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from graphlens import Ablate, ModelFileError, RunError
from graphlens.metrics import LogitDiff
from graphlens.runtime import open_session, operators
from graphlens.runtime.entry import Stoppable
from graphlens.runtime.ort_errors import ort_errors
from graphlens.runtime.sessions import Chain, save_optimised
from tests.command_line import graphlens, sentence
from tests.models import MODEL

FLOAT, INT64, BFLOAT16 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BFLOAT16
Inputs = Mapping[str, tuple[int, list[Any] | None]]


def graph(op: str, inputs: Inputs, dtype: int = FLOAT, opset: int = 20) -> bytes:
    """A graph of one node, which gives z."""
    values = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    node, result = helper.make_node(op, list(inputs), ["z"]), helper.make_tensor_value_info("z", dtype, None)
    made = helper.make_graph([node], "g", values, [result])
    return bytes(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10).SerializeToString()
    )


PRODUCT = graph("MatMul", {"x": (FLOAT, ["a", "b"]), "y": (FLOAT, ["b", "c"])})
ZEROS = graph("ConstantOfShape", {"n": (INT64, [1])})
LOOKUP = graph("Gather", {"x": (FLOAT, ["n"]), "i": (INT64, ["k"])})
ONES = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("model", "feeds", "told"),
    [
        (PRODUCT, {"x": ONES, "y": ONES}, r"MatMul.*dimension mismatch"),
        (PRODUCT, {"x": ONES[0], "y": ONES}, r"Invalid rank for input: x"),
        (PRODUCT, {"x": ONES.astype(float), "y": ONES.T}, r"tensor\(double\).*expected: \(tensor\(float\)\)"),
        (PRODUCT, {"x": ONES}, r"\['y'\]"),
        (PRODUCT, {"x": ONES, "y": ONES.T, "q": ONES}, r"Invalid input name: q"),
        (PRODUCT, {"x": ONES, "y": np.asarray([["a"]] * 3)}, r"non-string"),
        (LOOKUP, {"x": ONES[0], "i": np.asarray([7])}, r"idx=7"),
        (ZEROS, {"n": np.asarray([2**46])}, r"not enough memory.*names_filter"),
    ],
    ids=["sizes", "rank", "dtype", "missing", "unknown", "text", "index", "memory"],
)
def test_a_run_that_fails(model: bytes, feeds: dict[str, Any], told: str) -> None:
    session = open_session(model, "cpu", name="a graph made of x/model.onnx")
    found = []
    for run in (session.run, session.run_on_device, Chain(session, session, "z").run_on_device):
        with pytest.raises(RunError, match=rf"(?s)^a graph made of x/model.onnx: .*{told}") as caught:
            run(["z"], feeds)
        found.append(caught.value)
        for name, value in feeds.items():
            assert f"{name} {list(value.shape)}" in str(caught.value)
        assert isinstance(caught.value.__cause__, ort_errors())
    assert len({str(error) for error in found}) == 1


def test_a_run_that_is_stopped_before_it_begins() -> None:
    session = open_session(PRODUCT, "cpu")

    def stop(options: Stoppable) -> None:
        options.terminate = True

    with pytest.raises(RunError, match="terminate"):
        session.run(["z"], {"x": ONES, "y": ONES.T}, stop)
    np.testing.assert_array_equal(session.run(["z"], {"x": ONES, "y": ONES.T})[0], ONES @ ONES.T)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (b"garbage" * 10, "[Pp]rotobuf parsing failed"),
        (b"", "No graph was found"),
        (graph("Nope", {"x": (FLOAT, [1])}), "No Op registered for Nope"),
        (graph("Sin", {"x": (BFLOAT16, [1])}, BFLOAT16), r"bfloat16"),
        (graph("Sin", {"x": (FLOAT, [1])}, opset=99), "[Oo]pset"),
    ],
    ids=["garbage", "empty", "operator", "type", "opset"],
)
def test_a_graph_that_does_not_open(model: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model)
    for given in (path, model):
        with pytest.raises(ModelFileError, match=rf"(?s)^{path}: ONNX Runtime refuses this model: .*{told}"):
            open_session(given, "cpu", name=str(path))
    with pytest.raises(ModelFileError, match=rf"(?s)^{path}, to be saved.*{told}"):
        save_optimised(path, tmp_path / "optimised.onnx", "weights")


def test_a_kernel_that_is_missing_says_which_version_lacks_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = onnxruntime.capi.onnxruntime_pybind11_state

    def refuse(*_: object, **__: object) -> None:
        raise state.NotImplemented("Could not find an implementation for Sin(7)")

    monkeypatch.setattr("onnxruntime.InferenceSession", refuse)
    with pytest.raises(ModelFileError, match=rf"Sin\(7\) ONNX Runtime {onnxruntime.__version__} lacks"):
        open_session(tmp_path / "model.onnx", "cpu")


@pytest.mark.parametrize("kind", [MemoryError, RuntimeError])
def test_a_model_that_memory_does_not_hold_is_not_called_damaged(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise kind("std::bad_alloc")

    monkeypatch.setattr("onnxruntime.InferenceSession", refuse)
    with pytest.raises(RunError, match="not enough memory to open it"):
        open_session(tmp_path / "model.onnx", "cpu")


def test_a_library_of_operators_that_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="Failed to load library"):
        open_session(PRODUCT, "cpu", custom_ops=str(tmp_path / "nothing.so"), name="x")


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every run fail as it does where there is no memory left."""
    operators.callback_library()  # which makes a run of its own, once in a process

    def refuse(*_: object) -> None:
        state = onnxruntime.capi.onnxruntime_pybind11_state
        raise state.RuntimeException("Available memory of 12 is smaller than requested bytes of 34")

    monkeypatch.setattr("onnxruntime.InferenceSession.run_with_ort_values", refuse)


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize(
    "call",
    [
        lambda: MODEL([1, 2, 3]),
        lambda: MODEL.run_with_cache([1, 2, 3]),
        lambda: MODEL.run_with_hooks([1, 2, 3], fwd_hooks=[("hook_embed", lambda x, hook: None)]),
        lambda: MODEL.run_with_interventions([1, 2, 3], Ablate("blocks.1.attn.hook_z", heads=0)),
        lambda: MODEL.generate([1, 2, 3], max_new_tokens=2, verbose=False),
        lambda: MODEL.gradients([1, 2, 3], LogitDiff([5], [9])),
    ],
    ids=["forward", "cache", "hooks", "edits", "generate", "gradients"],
)
def test_whatever_runs_the_model_names_it_and_the_prompt(call: Callable[[], object]) -> None:
    with pytest.raises(RunError, match=r"model.onnx: there was not enough memory.*input_ids \[1, 3\].*names_filter"):
        call()
    assert MODEL.runner.active().plain


@pytest.mark.usefixtures("full")
def test_the_command_line_says_it_in_a_block(tiny_folder: Path) -> None:
    ran = graphlens("run", tiny_folder, "When John and Mary")
    assert ran.returncode == 1
    assert "RunError" in ran.stderr
    assert "not enough memory" in sentence(ran.stderr)
    assert "Traceback" not in ran.stderr
