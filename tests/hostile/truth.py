"""What is right: the numbers of the untouched file, by plain ONNX Runtime and NumPy. Nothing of graphlens is used here."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import tokenizers

Array = npt.NDArray[Any]
Edit = dict[str, Any]  # a kind, a hook point, an operand and selections, as an edits file has them
PROMPT = "When John and Mary went to the store, John gave a drink to"
CORRUPTED = "When John and Mary went to the store, Mary gave a drink to"
ANSWER, WRONG_ANSWER = " Mary", " John"
OPERANDS = {"ablate": "value", "patch": "value", "steer": "vector", "scale": "factor"}
TOLERANCE = 1e-4  # of max(1, the largest number): the same graph, in another order of sums


class NotFit(Exception):
    """An edit whose operand or selection does not fit the activation: it must be refused."""


class Truth:
    """A hooked folder as plain ONNX Runtime computes it.

    Args:
        folder: The folder.
        threads: How many threads a session has. One starts none, so that a process can be forked beside it.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        self.folder, self._threads = folder, threads
        self._proto = onnx.load(folder / "model.onnx", load_external_data=False)
        (self.manifest,) = (json.loads(p.value) for p in self._proto.metadata_props if p.key == "graphlens")
        self.vocabulary = int(self.manifest["config"]["d_vocab"])
        hooks = {**self.manifest["hooks"], "hook_tokens": {"value": "input_ids", "axes": ["batch", "pos"]}}
        self.values = {name: entry["value"] for name, entry in hooks.items()}
        self.axes = {name: tuple(entry["axes"]) for name, entry in hooks.items()}
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokens = np.random.default_rng(0).integers(0, self.vocabulary, (2, 6))

    def session(self, proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
        """A bare session over a graph whose weights lie in this folder."""
        return bare_session(proto.SerializeToString(), self.folder, self._threads)

    @functools.cached_property
    def plain(self) -> onnxruntime.InferenceSession:
        """The file as it is."""
        return self.session(self._proto)

    def run(self, tokens: Array, names: Sequence[str] = ("logits",)) -> list[Array]:
        """Hook points, or logits, of a run of tokens [b, p]."""
        if list(names) == ["hook_tokens"]:
            return [np.asarray(tokens, np.int64)]
        return run_bare(self.plain, tokens, [self.values.get(name, name) for name in names])

    @functools.cache  # noqa: B019  one Truth lives as long as the process
    def overriding(self, hook: str) -> onnxruntime.InferenceSession:
        """The graph with the value of a hook point as an input, in place of what computes it."""
        name, proto = self.values[hook], onnx.ModelProto()
        proto.CopyFrom(self._proto)
        kind = next(value for value in proto.graph.output if value.name == name).type
        for node in proto.graph.node:
            for index, output in enumerate(node.output):
                if output == name:
                    node.output[index] = f"{name}/computed"
        kept = [value for value in proto.graph.output if value.name == "logits"]
        del proto.graph.output[:]
        proto.graph.output.extend(kept)
        proto.graph.input.append(onnx.ValueInfoProto(name=name, type=kind))
        return self.session(proto)

    def with_value(self, tokens: Array, hook: str, value: Array) -> Array:
        """The logits of a run in which a hook point has another value."""
        if self.values[hook] == "input_ids":
            return self.run(value.astype(np.int64))[0]
        if self.values[hook] == "logits":
            return value
        feeds = {"input_ids": tokens, self.values[hook]: np.ascontiguousarray(value)}
        found: Array = self.overriding(hook).run(["logits"], feeds)[0]
        return found

    def edited(self, tokens: Array, edits: Sequence[Edit]) -> Array:
        """The logits of a run with edits, all at one hook point, in order.

        Raises:
            NotFit: For an edit that must be refused.
        """
        if not edits:
            return self.run(tokens)[0]
        (hook,) = {edit["hook"] for edit in edits}
        if hook not in self.axes:
            raise NotFit(f"no hook point {hook!r}")
        value = self.run(tokens, [hook])[0]
        for edit in edits:
            value = edited(value, self.axes[hook], edit)
        return self.with_value(tokens, hook, value)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, BOS before them."""
        return [0, *self.tokenizer.encode(text, add_special_tokens=False).ids]


def bare_session(model: bytes | str, folder: Path | None = None, threads: int = 1) -> onnxruntime.InferenceSession:
    """A bare session over the bytes or the path of a graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_bare(session: onnxruntime.InferenceSession, tokens: Array, names: Sequence[str]) -> list[Array]:
    """Outputs of a session for tokens [b, p]; any other input that a variant of a file asks for is 0."""
    feeds = {
        each.name: np.zeros([size if isinstance(size, int) else 1 for size in each.shape or ()], np.float32)
        for each in session.get_inputs()
    }
    feeds["input_ids"] = np.asarray(tokens, np.int64)
    found: list[Array] = session.run(list(names), feeds)
    return found


def fields_of(axes: Sequence[str]) -> list[str | None]:
    """The field of an edit that selects along each axis."""
    names = {"batch": "batch", "pos": "positions", "query_pos": "positions"}
    last = len(axes) - 1
    return [
        names.get(axis, "heads" if axis.endswith("head_index") else "dims" if index == last else None)
        for index, axis in enumerate(axes)
    ]


def edited(x: Array, axes: Sequence[str], edit: Edit) -> Array:
    """An activation after one edit.

    The operand's axes are those of the selected region, aligned from the right as in NumPy; an integer selection takes
    its axis away. Masked scores (-inf) stay masked.

    Raises:
        NotFit: The edit does not fit the activation.
    """
    fields = fields_of(axes)
    if any(edit.get(field) is not None for field in ("heads", "positions", "dims", "batch") if field not in fields):
        raise NotFit("it selects along an axis that is not there")
    chosen = [
        _indices(edit.get(field) if field else None, size, field) for field, size in zip(fields, x.shape, strict=True)
    ]
    grid = np.ix_(*(places for places, _ in chosen))
    region = x[grid]
    kept = [size for size, (_, is_one) in zip(region.shape, chosen, strict=True) if not is_one]
    if 0 in region.shape:
        return x  # a selection of nothing changes nothing
    operand = _operand(edit, x.dtype)
    while operand.ndim > len(kept) and operand.shape[0] == 1:
        operand = operand[0]  # as NumPy assigns: a mean that kept its axes, say
    try:
        fitted = np.broadcast_to(operand, kept).reshape(region.shape)
    except ValueError as error:
        raise NotFit(str(error)) from error
    with np.errstate(all="ignore"):
        new = {"steer": lambda: region + fitted, "scale": lambda: region * fitted}.get(edit["kind"], lambda: fitted)()
    if x.dtype.kind == "f" and np.isneginf(region).any():
        new = np.where(np.isneginf(region), region, new)
    result = x.copy()
    result[grid] = new
    return result


def _operand(edit: Edit, dtype: np.dtype[Any]) -> Array:
    """An edit's operand in the dtype of the activation; a steering vector times its coefficient."""
    raw = np.asarray(edit[OPERANDS[edit["kind"]]])
    if raw.dtype.kind not in "biuf" or raw.size == 0:
        raise NotFit(f"an operand of {raw.dtype}, {raw.shape}")
    with np.errstate(all="ignore"):
        if edit["kind"] == "steer":
            raw = (raw * edit.get("coefficient", 1.0)).astype(raw.dtype if raw.dtype.kind == "f" else np.float64)
        if not np.isfinite(raw).all() and not edit.get("allow_nonfinite", False):
            raise NotFit("it holds NaN or infinities")
        if dtype.kind in "iu" and (edit["kind"] not in ("patch",) or raw.dtype.kind not in "iu"):
            raise NotFit("an integer hook point takes a Patch of integers")
        return raw.astype(dtype)


def _indices(selection: Any, size: int, field: str | None) -> tuple[npt.NDArray[np.int64], bool]:
    """(the selected places of an axis, True if the selection takes the axis away)."""
    every = np.arange(size)
    if selection is None or (field == "positions" and isinstance(selection, str) and selection == "prompt"):
        return every, False
    try:
        if isinstance(selection, slice):
            return every[selection], False
        array = np.asarray(list(selection) if isinstance(selection, range) else selection)
        if (
            array.dtype.kind not in "biu"
            or array.ndim > 1
            or not array.size
            or (array.dtype == bool and not array.ndim)
        ):
            raise NotFit(f"a selection by {selection!r}")
        return np.atleast_1d(every[array]), array.ndim == 0
    except (IndexError, TypeError, ValueError, OverflowError) as error:
        raise NotFit(str(error)) from error


def differs(found: Any, expected: Array, what: str, tolerance: float = TOLERANCE) -> list[str]:
    """What is wrong with an array, in at most one line: nothing where it is as expected."""
    found = np.asarray(found)
    if found.shape != expected.shape:
        return [f"{what} has shape {list(found.shape)}, not {list(expected.shape)}"]
    if found.dtype.kind != expected.dtype.kind:
        return [f"{what} is {found.dtype}, not {expected.dtype}"]
    if found.dtype.kind not in "fc":
        return [] if np.array_equal(found, expected) else [f"{what} differs"]
    finite = np.isfinite(expected)
    if not np.array_equal(found[~finite], expected[~finite], equal_nan=True) or not np.isfinite(found[finite]).all():
        return [f"{what} has NaN or infinities at other places"]
    off = float(np.abs(found[finite] - expected[finite]).max(initial=0))
    largest = float(np.abs(expected[finite]).max(initial=1.0))
    return [] if off <= tolerance * largest else [f"{what} is off by {off:.3g}, of numbers up to {largest:.3g}"]


def log_softmax(logits: Array) -> Array:
    """log softmax over the last axis, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    found: Array = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return found


def softmax(logits: Array) -> Array:
    """softmax over the last axis, in float64."""
    found: Array = np.exp(log_softmax(logits))
    return found


def is_number(value: Any) -> bool:
    """True for an int or a finite float that is no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
