"""The embedded models quantised statically, and what is at their hook points when the rounding is taken out."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import graphlens
from graphlens.deploy import write_stripped
from graphlens.surgery.match import Match
from graphlens.surgery.unfusing.unrounded import unrounded
from tests.matched import activations, opened, values_of

Array = npt.NDArray[Any]


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # the library is not typed
    def __init__(self, feeds: dict[str, Array]) -> None:
        self._left = [feeds]

    def get_next(self) -> dict[str, Array] | None:
        return self._left.pop() if self._left else None


def statically(name: str, folder: Path, form: str, wide: bool = False) -> Path:
    """An embedded model as ONNX Runtime's ``quantize_static`` writes it.

    Args:
        name: The model.
        folder: Where to put it, and what it is made of.
        form: "QDQ" or "QOperator".
        wide: True rounds activations to 16 bits.
    """
    plain = write_stripped(graphlens.embedded_model(name), folder / "plain") / "model.onnx"
    _whole(plain, folder / "whole.onnx")
    prepared, target = folder / "prepared.onnx", folder / f"{name}.{form}.onnx"
    tokens, mask = prompts(name)
    width = QuantType.QUInt16 if wide else QuantType.QUInt8
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            quant_pre_process(folder / "whole.onnx", prepared, skip_symbolic_shape=True)
            given = onnxruntime.InferenceSession(prepared, providers=["CPUExecutionProvider"])
            known = {"input_ids": tokens, "attention_mask": mask}
            feeds = {each.name: known[each.name] for each in given.get_inputs()}
            quantize_static(
                prepared,
                target,
                _Reader(feeds),
                QuantFormat[form],
                # With Mul, its QOperator form loses what some of the nodes read.
                op_types_to_quantize=None if form == "QDQ" else ["MatMul", "Gemm", "Add", "Softmax"],
                activation_type=width,
            )
    finally:
        logging.disable(before)
    return target


def _whole(source: Path, target: Path) -> None:
    """Writes a model as one file without optional inputs: a mask is fed, positions are counted."""
    model = onnx.load(source)
    optional = {value.name for value in model.graph.input} & {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.input if value.name not in optional - {"attention_mask"}]
    defaults = [tensor for tensor in model.graph.initializer if tensor.name != "attention_mask"]
    del model.graph.input[:], model.graph.initializer[:]
    model.graph.input.extend(kept)
    model.graph.initializer.extend(defaults)
    onnx.save(model, target)


def prompts(name: str) -> tuple[Array, Array]:
    """Tokens and a mask with padding on both sides, [3, 11]."""
    vocabulary = graphlens.HookedTransformer.from_onnx(graphlens.embedded_model(name), "cpu").cfg.d_vocab
    tokens, mask = np.random.default_rng(3).integers(0, vocabulary, (3, 11)), np.ones((3, 11), np.int64)
    mask[1, :4] = mask[2, 8:] = 0
    return tokens, mask


def without_rounding(file: Path, name: str) -> tuple[dict[str, Array], Array, Array, Match]:
    """(activations by hook point, logits, mask, what was found) of a quantised file without its quantisers of activations."""
    model, found = opened(file)
    tokens, mask = prompts(name)
    ports, feeds = found.ports, {found.ports.input: tokens}
    if ports.attention_mask is not None:
        feeds[ports.attention_mask] = mask
    plain = unrounded(model)
    assert not [node for node in plain.graph if node.op_type == "QuantizeLinear"]
    assert ports.logits is not None
    logits = values_of(plain, [ports.logits], feeds)[ports.logits]
    return activations(plain, found, feeds), logits, mask, found
