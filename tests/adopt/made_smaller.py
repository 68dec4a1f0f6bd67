"""Quantised, halved and fused files, made of a float file by the tools that people use for it."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx

from tests.adopt.adopt_cases import feeds_of, inputs_of
from tests.adopt.checkpoints import CHECKPOINTS, family_of


def _dynamic(source: Path, target: Path, per_channel: bool = False, activations: bool = False) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Products of two activations are rounded too where the quantiser is told so: optimum's default.
    more = {"MatMulConstBOnly": not activations}
    quantize_dynamic(source, target, per_channel=per_channel, weight_type=QuantType.QInt8, extra_options=more)


def _nbits(source: Path, target: Path) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=32, is_symmetric=False, bits=4)
    quantizer.process()
    onnx.save(quantizer.model.model, target)


def _calibration(name: str, source: Path) -> object:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        """The plain case, once."""

        def __init__(self) -> None:
            given = {f"in.{key}": value for key, value in inputs_of(name, "plain").items()}
            graph = onnx.load(source, load_external_data=False).graph
            self.left = [feeds_of(name, given, [value.name for value in graph.input])]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    return Reader()


def _static(source: Path, target: Path, name: str, operators: bool) -> None:
    from onnxruntime.quantization import QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    form = QuantFormat.QOperator if operators else QuantFormat.QDQ
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(prepared, target, _calibration(name, prepared), quant_format=form)


def _halved(source: Path, target: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


def _optimised(source: Path, target: Path, name: str, level: int) -> None:
    from onnxruntime.transformers.optimizer import optimize_model

    kind = {"gpt2": "gpt2", "bert": "bert", "vit": "vit"}.get(family_of(name), "gpt2")
    arguments = CHECKPOINTS[name].arguments
    heads = arguments.get("num_attention_heads") or arguments["n_head"]
    width = arguments.get("hidden_size") or arguments["n_embd"]
    made = optimize_model(str(source), kind, num_heads=heads, hidden_size=width, opt_level=level, use_gpu=False)
    made.save_model_to_file(str(target))


def _session_level(source: Path, target: Path, level: str) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def _fused(source: Path, target: Path) -> None:
    import onnx_ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model, _ = optimize_for_ort(onnx_ir.load(source))
    onnx_ir.save(model, target)


# Route -> what makes a file of that kind of (family, source, target).
Maker = Callable[[str, Path, Path], None]
ROUTES: dict[str, Maker] = {
    "int8": lambda _n, source, target: _dynamic(source, target),
    "int8-channel": lambda _n, source, target: _dynamic(source, target, per_channel=True),
    "int8-all": lambda _n, source, target: _dynamic(source, target, activations=True),
    "int4": lambda _n, source, target: _nbits(source, target),
    "qdq": lambda name, source, target: _static(source, target, name, operators=False),
    "qoperator": lambda name, source, target: _static(source, target, name, operators=True),
    "fp16": lambda _n, source, target: _halved(source, target),
    "ort0": lambda name, source, target: _optimised(source, target, name, 0),
    "ort1": lambda name, source, target: _optimised(source, target, name, 1),
    "ort2": lambda name, source, target: _optimised(source, target, name, 2),
    "ort99": lambda name, source, target: _optimised(source, target, name, 99),
    "session-basic": lambda _n, source, target: _session_level(source, target, "BASIC"),
    "session-extended": lambda _n, source, target: _session_level(source, target, "EXTENDED"),
    "session-all": lambda _n, source, target: _session_level(source, target, "ALL"),
    "fusions": lambda _n, source, target: _fused(source, target),
}


def make_smaller(route: str, name: str, source: Path, target: Path) -> None:
    """Makes a file by a route of ROUTES of a float file of a family."""
    with _quiet():
        ROUTES[route](name, source, target)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tools' own words."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
