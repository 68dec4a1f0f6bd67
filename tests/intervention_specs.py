"""Random interventions for the tests, and what they mean, written out with NumPy's own indexing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from hypothesis import reject
from hypothesis import strategies as st

from graphlens import Ablate, HookedTransformer, Patch, Scale, Steer
from graphlens.errors import InputError
from graphlens.file.names import axis_sizes
from graphlens.interventions import Intervention
from graphlens.patching import Site

FLAG_SETS: tuple[tuple[str, ...], ...] = (
    (),
    ("use_attn_result", "use_hook_mlp_in", "use_hook_tokens"),
    ("use_split_qkv_input",),
    ("use_attn_in",),
)


def set_flags(model: HookedTransformer, flags: Sequence[str]) -> None:
    every = {flag for group in FLAG_SETS for flag in group}
    for flag in sorted(every, key=lambda flag: flag in flags):  # off before on: two of them exclude each other
        getattr(model, f"set_{flag}")(flag in flags)


def shape_of(model: HookedTransformer, hook: str, batch: int, length: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(axes, sizes) of a hook point in a run."""
    axes = model.runner.engine.hooks(model.runner.plan())[hook].axes
    sizes = {
        **axis_sizes(model.cfg),
        "batch": batch,
        **dict.fromkeys(("pos", "query_pos", "key_pos"), length),
    }
    return axes, tuple(sizes[axis] for axis in axes)


def fields_of(axes: Sequence[str]) -> list[str | None]:
    """The field of an intervention that selects along each axis."""
    names: dict[str, str] = {"batch": "batch", "pos": "positions", "query_pos": "positions"}
    return [names.get(axis, "heads" if axis.endswith("head_index") else "dims" if i == len(axes) - 1 else None)
            for i, axis in enumerate(axes)]  # fmt: skip


def region_of(item: Intervention, axes: Sequence[str], sizes: Sequence[int]) -> tuple[list[np.ndarray], list[int]]:
    """(the selected indices along each axis, the places of the axes that the selected part has)."""
    indices, kept = [], []
    for place, (size, field) in enumerate(zip(sizes, fields_of(axes), strict=True)):
        selection = getattr(item, field) if field else None
        chosen = np.arange(size)[
            slice(None) if selection is None else np.asarray(selection) if isinstance(selection, tuple) else selection
        ]
        indices.append(np.atleast_1d(chosen))
        kept += [place] if chosen.ndim else []  # NumPy's index by an integer takes the axis away
    return indices, kept


def patch_of(site: Site, activation: np.ndarray, axes: Sequence[str]) -> Patch:
    """The patch that puts a site's part of a whole activation there; all of it at a mask [batch, pos]."""
    if np.ndim(site.position) == 2:
        assert not isinstance(site.head, int)
        heads = slice(None) if site.head is None else list(site.head)  # type: ignore[arg-type]
        return site.patch(activation if site.head is None else activation[:, :, heads])
    if activation.size == 1:
        return site.patch(activation)
    indices, kept = region_of(site.patch(), axes, activation.shape)
    removed = tuple(place for place in range(activation.ndim) if place not in kept)
    return site.patch(activation[np.ix_(*indices)].squeeze(removed))


def reference(item: Intervention, x: np.ndarray, axes: Sequence[str], scores: bool) -> np.ndarray:
    """The activation after one intervention, on a whole run: ``x[selection] = value`` of NumPy, axis by axis."""
    indices, kept = region_of(item, axes, x.shape)
    grid = np.ix_(*indices)
    region = x[grid]
    removed = tuple(place for place in range(x.ndim) if place not in kept)
    operand = np.broadcast_to(item.array, [region.shape[place] for place in kept])
    operand = np.expand_dims(operand, removed).astype(x.dtype)
    new = {"add": lambda: region + operand, "scale": lambda: region * operand}.get(item.part, lambda: operand)()
    if scores:
        new = np.where(np.isneginf(region), region, new)
    edited = x.copy()
    edited[grid] = new
    return edited


def python_hooks(model: HookedTransformer, items: Sequence[Intervention]) -> list[tuple[str, Callable[..., Any]]]:
    """The same edits as Python hooks."""

    def hook_of(item: Intervention) -> Callable[..., Any]:
        scores = item.hook.endswith("hook_attn_scores")

        def edit(activation: Any, hook: Any) -> Any:
            axes = model.runner.engine.hooks(model.runner.plan())[item.hook].axes
            return reference(item, np.asarray(activation), axes, scores)

        return edit

    return [(item.hook, hook_of(item)) for item in items]


@st.composite
def selections(draw: Callable[..., Any], size: int) -> Any:
    """A selection along an axis of ``size``: every form there is."""
    form = draw(st.sampled_from(["all", "all", "int", "negative", "list", "slice", "mask"]))
    if form == "int":
        return draw(st.integers(0, size - 1))
    if form == "negative":
        return draw(st.integers(-size, -1))
    if form == "list":
        return draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True))
    if form == "slice":
        start, step = draw(st.integers(0, size - 1)), draw(st.sampled_from([1, 1, 2, 3]))
        return slice(start - size if draw(st.booleans()) and start else start, None, step)
    if form == "mask":
        mask = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        mask[draw(st.integers(0, size - 1))] = True
        return mask
    return None


@st.composite
def interventions(
    draw: Callable[..., Any], model: HookedTransformer, batch: int, length: int, hooks: Sequence[str]
) -> Intervention:
    """One intervention at one of ``hooks``, its operand a number or an array of any shape that fits."""
    hook = draw(st.sampled_from(hooks))
    axes, sizes = shape_of(model, hook, batch, length)
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    chosen = {field: draw(selections(size)) for field, size in zip(fields_of(axes), sizes, strict=True) if field}
    indices, places = region_of(Ablate(hook, **chosen), axes, sizes)
    region = [indices[place].size for place in places]
    if hook == "hook_tokens":
        return Patch(hook, rng.integers(0, model.cfg.d_vocab, region), **chosen)
    shape = [1 if draw(st.booleans()) else size for size in region]
    kept = shape[draw(st.integers(0, len(shape))) :]  # leading axes may be left out
    array: Any = rng.standard_normal(kept).astype(np.float32) if kept else float(rng.standard_normal())
    kind = draw(st.sampled_from([Ablate, Patch, Steer, Scale]))
    if hook.endswith("hook_scale"):  # a norm is divided by it
        array = np.abs(array) + 0.5
    options: dict[str, Any] = {"coefficient": float(draw(st.sampled_from([1.0, -0.5])))} if kind is Steer else {}
    if kind is Steer and hook.endswith("hook_scale"):
        options = {}
    return kind(hook, array, **options, **chosen)


@st.composite
def runs(
    draw: Callable[..., Any], model: HookedTransformer, hooks: Sequence[str]
) -> tuple[np.ndarray, list[Intervention]]:
    """Tokens [b, p] and one to three interventions that fit them."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    tokens = np.random.default_rng(draw(st.integers(0, 99))).integers(0, model.cfg.d_vocab, (batch, length))
    return tokens, draw(st.lists(interventions(model, batch, length, hooks), min_size=1, max_size=3))


def baked(model: HookedTransformer, items: Sequence[Intervention], out: Path, **options: Any) -> Path:
    """The baked folder; the example is left out where a file can't hold the edits, which the error has to say."""
    try:
        return model.bake(items, out, **options)
    except InputError as error:
        if not re.search("depends on the length|counted from the same end", str(error)):
            raise
        reject()


def plain_session(folder: Path) -> onnxruntime.InferenceSession:
    """A bare session on a written folder."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def feeds_of(session: onnxruntime.InferenceSession, tokens: np.ndarray, cfg: Any) -> dict[str, np.ndarray]:
    """A whole prompt, with an empty cache where there is one."""
    feeds = {"input_ids": tokens}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            feeds[value.name] = np.zeros((len(tokens), cfg.n_heads, 0, cfg.d_head), np.float32)
    if any(value.name == "position_ids" for value in session.get_inputs()):
        feeds["attention_mask"] = np.ones_like(tokens)
        feeds["position_ids"] = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape).copy()
    return feeds


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Within a share of max(1, max|expected|); NaN and infinities stand at the same places."""
    assert found.shape == expected.shape
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found[~finite], expected[~finite])
    largest = np.abs(expected[finite]).max(initial=1.0)
    assert np.abs(found[finite] - expected[finite]).max(initial=0) <= tolerance * largest
