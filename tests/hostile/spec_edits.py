"""Edits as users write them, well and badly, against NumPy and plain ONNX Runtime."""

from __future__ import annotations

import decimal
import fractions
from typing import Any

import numpy as np
from hypothesis import strategies as st

from graphlens import interventions
from graphlens.errors import GraphlensError
from tests.hostile.cases import Place
from tests.hostile.truth import OPERANDS, Edit, NotFit, Truth, differs

HOOKS = (
    "hook_tokens", "hook_embed", "hook_pos_embed", "blocks.0.hook_resid_pre", "blocks.1.hook_resid_mid",
    "blocks.3.hook_resid_post",
    "blocks.1.attn.hook_q", "blocks.0.attn.hook_z", "blocks.2.attn.hook_attn_scores", "blocks.2.attn.hook_pattern",
    "blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out", "blocks.0.ln1.hook_scale", "ln_final.hook_normalized",
)  # fmt: skip
BAD_HOOKS = (
    "",
    "blocks.9.hook_resid_pre",
    "hook_nothing",
    "blocks.0",
    "*",
    None,
    7,
    b"hook_embed",
    ["hook_embed"],
    "hook_embed\0",
)
SIZES = {"head_index": 4, "d_model": 128, "d_head": 32, "d_mlp": 512, "d_vocab": 800, "1": 1}
KINDS = {
    "ablate": interventions.Ablate,
    "patch": interventions.Patch,
    "steer": interventions.Steer,
    "scale": interventions.Scale,
}


def shape_of(hook: str, batch: int, length: int) -> tuple[int, ...]:
    """The shape of an activation of the embedded model."""
    last = hook.rpartition(".")[2]
    if last == "hook_tokens":
        return (batch, length)
    if last in ("hook_attn_scores", "hook_pattern"):
        return (batch, 4, length, length)
    if last in ("hook_q", "hook_k", "hook_v", "hook_z"):
        return (batch, length, 4, 32)
    return (batch, length, {"hook_post": 512, "hook_pre": 512, "hook_scale": 1}.get(last, 128))


def fields_at(hook: str) -> list[str | None]:
    """The field that selects along each axis there."""
    last = hook.rpartition(".")[2]
    if last in ("hook_attn_scores", "hook_pattern"):
        return ["batch", "heads", "positions", "dims"]
    if last in ("hook_q", "hook_k", "hook_v", "hook_z"):
        return ["batch", "positions", "heads", "dims"]
    return ["batch", "positions", "dims"][: 2 if last == "hook_tokens" else 3]


@st.composite
def selections(draw: st.DrawFn, size: int) -> Any:
    """A selection of an axis: fitting ones most of the time."""
    kind = draw(st.sampled_from(["none"] * 5 + ["int", "int", "slice", "list", "mask", "bad"]))
    if kind == "none":
        return None
    if kind == "int":
        return draw(st.integers(-size, size - 1).map(draw(st.sampled_from([int, np.int64, np.int16, np.array]))))
    if kind == "slice":
        part = st.none() | st.integers(-size - 1, size + 1)
        return slice(draw(part), draw(part), draw(st.sampled_from([None, 1, 2, -1, 3])))
    if kind == "list":
        places = draw(st.lists(st.integers(-size, size - 1), min_size=1, max_size=size))
        return draw(st.sampled_from([list, tuple, np.array]))(places)
    if kind == "mask":
        return draw(st.sampled_from([list, np.array]))(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    return draw(st.sampled_from(_bad_selections(size)))


def _bad_selections(size: int) -> list[Any]:
    return [
        size, -size - 1, 2**40, 2**63, 2**70, -(2**70), True, False, 1.0, 0.5, float("nan"), "0", "all", "prompt",
        "generated", "",
        [], [[]], [[0]], [0.0], ["0"], [None], [0, None], [True] * (size + 1), [False] * size, [size], slice(0, 1, 0),
        slice(0.5, 2), slice("a", "b"), slice(None, None, 2**70), slice(size, size), {0}, {0: 1}, (), np.zeros((2, 2), int),
        np.float32(1), np.array(1 + 1j), range(0), range(2), range(10**6), b"0", object(), Ellipsis, lambda: 0, [2**70],
        [[0], [0, 1]],
        np.array([0], dtype=object), np.array(["0"]), np.uint64(2**63), decimal.Decimal(1),
    ]  # fmt: skip


@st.composite
def operands(draw: st.DrawFn, shape: tuple[int, ...], region: tuple[int, ...]) -> Any:
    """An operand: a number, or an array that may or may not fit the activation or the selected region."""
    kind = draw(st.sampled_from(["number"] * 4 + ["region"] * 4 + ["suffix", "suffix", "whole", "wrong", "bad"]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from(["float32"] * 6 + ["float64", "float16", "int64", "int8", "uint8", "bool"]))
    if kind == "number":
        return draw(
            st.sampled_from([0.0, 1.0, -2.5, 3, 0, True, 1e-30, 1e30, np.float16(0.5), np.float32(2), np.int8(-3)])
        )
    if kind == "bad":
        return draw(st.sampled_from(_bad_operands()))
    wanted = {"region": region, "whole": shape}.get(kind, region)
    if kind == "suffix":
        wanted = region[draw(st.integers(0, len(region))) :]
        wanted = tuple(1 if draw(st.booleans()) else size for size in wanted)
    if kind == "wrong":
        wanted = tuple(draw(st.lists(st.integers(0, 6), max_size=5)))
    values = (rng.standard_normal(wanted) * 3).astype(dtype)
    return values.tolist() if draw(st.booleans()) and values.size < 100 else values


def _bad_operands() -> list[Any]:
    return [
        None, "1", "", b"1", [], [[]], [[1], [1, 2]], ["a"], [None], {}, {1}, object(), lambda: 0, 1j, np.array(1j),
        float("nan"),
        float("inf"), 1e300, -1e300, 1e39, 2**70, 10**400, np.array([np.nan] * 128), np.array("2020", "M8[D]"), np.zeros(0),
        np.array([1, "a"], object), np.array([1.5], object), np.ma.masked_array([1.0] * 128, [True] * 128),
        fractions.Fraction(1, 2),
        decimal.Decimal("0.5"), np.longdouble(1.5), slice(1), np.zeros((1,) * 10), np.zeros((1,) * 40), range(128),
    ]  # fmt: skip


@st.composite
def edits(draw: st.DrawFn, hook: str, batch: int, length: int) -> Edit:
    """One edit at a hook point, as a dictionary of its arguments."""
    shape, fields = shape_of(hook, batch, length), fields_at(hook)
    chosen = {field: draw(selections(size)) for field, size in zip(fields, shape, strict=True) if field}
    region = []
    for field, size in zip(fields, shape, strict=True):
        selection = chosen.get(field) if field else None
        if isinstance(selection, int | np.integer) and not isinstance(selection, bool):
            continue
        try:
            region.append(size if selection is None else len(np.arange(size)[selection]))
        except (TypeError, IndexError, ValueError, OverflowError):
            region.append(size)
    kind = draw(st.sampled_from(sorted(KINDS)))
    edit: Edit = {"kind": kind, "hook": hook, OPERANDS[kind]: draw(operands(shape, tuple(region)))}
    edit |= {field: value for field, value in chosen.items() if value is not None}
    if hook == "hook_tokens" and draw(st.integers(0, 3)):
        edit = {**edit, "kind": "patch", "value": draw(st.integers(-2, 802))}
        edit = {name: value for name, value in edit.items() if name not in ("vector", "factor")}
        return edit
    if kind == "steer" and draw(st.integers(0, 3)) == 0:
        edit["coefficient"] = draw(
            st.sampled_from([2.0, -1, 0, 0.5, float("nan"), "1", None, [1.0], np.ones(3), 1e300, True])
        )
    if draw(st.integers(0, 15)) == 0:
        edit["allow_nonfinite"] = draw(st.sampled_from([True, True, False, 1, "yes", None]))
    if draw(st.integers(0, 20)) == 0:
        field = draw(st.sampled_from(["heads", "positions", "dims", "batch"]))
        edit[field] = draw(selections(4))
    return edit


@st.composite
def edit_runs(draw: st.DrawFn) -> dict[str, Any]:
    """Tokens [b, p] and one to three edits at one hook point."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    hook = draw(st.sampled_from(HOOKS))
    made = [draw(edits(hook, batch, length)) for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3])))]
    if draw(st.integers(0, 20)) == 0:
        made[0]["hook"] = draw(st.sampled_from(BAD_HOOKS))
    return {"seed": draw(st.integers(0, 99)), "batch": batch, "length": length, "edits": made}


def tokens_of(spec: dict[str, Any], truth: Truth) -> np.ndarray:
    """The tokens of a spec."""
    return np.random.default_rng(spec["seed"]).integers(0, truth.vocabulary, (spec["batch"], spec["length"]))


def expected(truth: Truth, tokens: np.ndarray, made: list[Edit]) -> np.ndarray | None:
    """The logits that edits give; None where they must be refused.

    Ids that the vocabulary lacks must be refused too: ONNX Runtime would read another row, or none.
    """
    try:
        hooks = {str(edit.get("hook")) for edit in made}
        if len(hooks) != 1 or any(not isinstance(edit.get("hook"), str) for edit in made):
            return None
        for edit in made:
            coefficient = edit.get("coefficient", 1.0)
            if not isinstance(coefficient, int | float | np.number) or not np.isfinite(coefficient):
                return None
        found = truth.edited(tokens, made)
    except (NotFit, KeyError, TypeError, ValueError, OverflowError):
        return None
    except Exception as error:
        if type(error).__module__.startswith("onnxruntime"):
            return None
        raise
    return found


def run(warm: Any, spec: dict[str, Any], _: Place) -> list[str]:
    """Runs edits made by the classes, and compares the logits."""
    tokens = tokens_of(spec, warm.truth)
    right = expected(warm.truth, tokens, spec["edits"])
    try:
        made = [
            KINDS[edit["kind"]](**{name: value for name, value in edit.items() if name != "kind"})
            for edit in spec["edits"]
        ]
        found = warm.model.run_with_interventions(tokens, made)
    except GraphlensError:
        raise
    if right is None:
        return ["it ran, and it fits no rule that is written down"]
    return differs(found, right, "logits")
