"""TransformerLens's activation patching: the same functions, arguments and shapes, over sweeps that recompute less.

``get_act_patch_*`` take (model, corrupted_tokens, clean_cache, patching_metric). A metric of graphlens.metrics lets them
compute only the logits it reads; a function of logits works too, and costs their unembedding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens.analysis.sites import GRIDS, Site, Sites, grid
from graphlens.errors import InputError
from graphlens.experiments.sweep import Measure, sweep
from graphlens.file.names import get_act_name

Array = npt.NDArray[Any]
Setter = Callable[[Any, Sequence[int], Any], Any]
AXES = ("layer", "pos", "head_index", "head", "src_pos", "dest_pos")


# Setters: what each puts in place is also known as a Site


def layer_pos_patch_setter(corrupted_activation: Any, index: Sequence[int], clean_activation: Any) -> Any:
    """Patches a position: ``index`` is (layer, position)."""
    _, position = index
    corrupted_activation[:, position, ...] = clean_activation[:, position, ...]
    return corrupted_activation


def layer_pos_head_vector_patch_setter(corrupted_activation: Any, index: Sequence[int], clean_activation: Any) -> Any:
    """Patches a head's vector (q, k, v, z) at a position: ``index`` is (layer, position, head)."""
    _, position, head = index
    corrupted_activation[:, position, head] = clean_activation[:, position, head]
    return corrupted_activation


def layer_head_vector_patch_setter(corrupted_activation: Any, index: Sequence[int], clean_activation: Any) -> Any:
    """Patches a head's vectors at all positions: ``index`` is (layer, head)."""
    _, head = index
    corrupted_activation[:, :, head] = clean_activation[:, :, head]
    return corrupted_activation


def layer_head_pattern_patch_setter(corrupted_activation: Any, index: Sequence[int], clean_activation: Any) -> Any:
    """Patches a head's whole pattern: ``index`` is (layer, head)."""
    _, head = index
    corrupted_activation[:, head] = clean_activation[:, head]
    return corrupted_activation


def layer_head_pos_pattern_patch_setter(corrupted_activation: Any, index: Sequence[int], clean_activation: Any) -> Any:
    """Patches a head's pattern at a query's position: ``index`` is (layer, head, destination)."""
    _, head, destination = index
    corrupted_activation[:, head, destination] = clean_activation[:, head, destination]
    return corrupted_activation


def layer_head_dest_src_pos_pattern_patch_setter(
    corrupted_activation: Any, index: Sequence[int], clean_activation: Any
) -> Any:
    """Patches one entry of a head's pattern: ``index`` is (layer, head, destination, source)."""
    _, head, destination, source = index
    corrupted_activation[:, head, destination, source] = clean_activation[:, head, destination, source]
    return corrupted_activation


_PARTS: dict[Any, tuple[str, ...]] = {
    layer_pos_patch_setter: ("position",),
    layer_pos_head_vector_patch_setter: ("position", "head"),
    layer_head_vector_patch_setter: ("head",),
    layer_head_pattern_patch_setter: ("head",),
    layer_head_pos_pattern_patch_setter: ("head", "position"),
    layer_head_dest_src_pos_pattern_patch_setter: ("head", "position", "dims"),
}


def generic_activation_patch(
    model: Any,
    corrupted_tokens: Any,
    clean_cache: Any,
    patching_metric: Measure,
    patch_setter: Setter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: Any = None,
    return_index_df: bool = False,
) -> Any:
    """Patches an activation at many indices, one at a time, and measures each: float32, shaped like the index axes.

    ``patch_setter(corrupted_activation, index, clean_activation)`` edits the first in place or returns it; any function
    will do, and takes one forward with a Python hook per index; this module's own are recomputed as ``sweep`` does.
    ``index_axis_names``: which of "layer", "pos", "head", "head_index", "dest_pos", "src_pos" to run over; or
    ``index_df``, a pandas table of indices, whose results are flat. ``return_index_df`` also returns that table (pandas).
    Raises UnknownHookPoint and InputError as ``sweep`` does. TransformerLens: ``patching.generic_activation_patch``.
    """
    indices, shape, columns = _indices(model, corrupted_tokens, index_axis_names, index_df, activation_name)
    parts = _PARTS.get(patch_setter)
    if parts is not None:
        short = [dict(zip(parts, index[1:], strict=True)) for index in indices]
        sites = tuple(Site(activation_name, index[0], **part) for index, part in zip(indices, short, strict=True))
        labels = {"site": tuple(map(str, range(len(sites))))}
        found = sweep(model, corrupted_tokens, Sites(sites, ("site",), labels), clean_cache, patching_metric).values
    else:
        found = _one_by_one(
            model, corrupted_tokens, clean_cache, patching_metric, patch_setter, activation_name, indices
        )
    result = model._to_user(np.ascontiguousarray(found.reshape(shape), np.float32))
    return (result, _table(indices, columns)) if return_index_df else result


def _one_by_one(
    model: Any, tokens: Any, cache: Any, metric: Measure, setter: Setter, name: str, indices: Sequence[Sequence[int]]
) -> Array:
    values = []
    for index in indices:
        hook_name = get_act_name(name, index[0])
        clean = cache[hook_name]

        def patch(activation: Any, hook: Any, index: Sequence[int] = index, clean: Any = clean) -> Any:
            return setter(activation, index, clean)

        values.append(float(metric(model.run_with_hooks(tokens, fwd_hooks=[(hook_name, patch)]))))
    if np.isnan(values).any():
        raise InputError(f"the metric is NaN at index {indices[int(np.isnan(values).argmax())]}.")
    return np.asarray(values)


def _indices(
    model: Any, tokens: Any, names: Sequence[str] | None, table: Any, activation: str
) -> tuple[list[tuple[int, ...]], tuple[int, ...], list[str]]:
    """(every index, the result's shape, the axes)."""
    if (names is None) == (table is None):
        raise InputError("give either index_axis_names or index_df.")
    if names is None:
        rows = [tuple(int(i) for i in row) for row in table.to_numpy().tolist()]
        if not rows:
            raise InputError("index_df is empty: there is nothing to patch.")
        return rows, (len(rows),), list(table.columns)
    unknown = [name for name in names if name not in AXES]
    if unknown or not names or names[0] != "layer":
        raise InputError(f"index_axis_names are 'layer' and then some of {', '.join(AXES[1:])}, not {list(names)}.")
    ranges = _ranges(model, tokens, activation)
    sizes = tuple(len(ranges[{"head_index": "head"}.get(name, name)]) for name in names)
    return list(itertools.product(*map(range, sizes))), sizes, list(names)


def _ranges(model: Any, tokens: Any, activation: str) -> dict[str, range]:
    cfg = model.cfg
    length = model.to_tokens(tokens).shape[-1] if isinstance(tokens, (str, list)) else np.shape(tokens)[-1]
    heads = cfg.n_key_value_heads if activation in ("k", "v") and cfg.n_key_value_heads else cfg.n_heads
    positions = dict.fromkeys(("pos", "dest_pos", "src_pos"), range(length))
    return {"layer": range(cfg.n_layers), "head": range(heads), **positions}


def _table(rows: Sequence[Sequence[int]], columns: Sequence[str]) -> Any:
    try:
        import pandas as pd  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputError("return_index_df needs pandas: pip install pandas.") from error
    return pd.DataFrame(list(rows), columns=list(columns))


# The named functions


def act_patch_sites(
    model: Any, corrupted_tokens: Any, name: str, labels: Mapping[str, Sequence[str]] | None = None
) -> Sites:
    """The sites of a ``get_act_patch_*`` function, by the rest of its name ("resid_pre", "attn_head_out_all_pos").

    ``labels`` are what to call an axis's entries in the result: ``{"pos": model.to_str_tokens(prompt)}``.
    """
    if name not in GRIDS:
        raise InputError(f"no sites are called {name!r}: there are {', '.join(GRIDS)}.")
    activation, axes = GRIDS[name]
    return grid(activation, axes, _ranges(model, corrupted_tokens, activation), labels or {})


def _act_patch(
    name: str,
    model: Any,
    corrupted_tokens: Any,
    clean_cache: Any,
    patching_metric: Measure,
    return_index_df: bool = False,
) -> Any:
    sites = act_patch_sites(model, corrupted_tokens, name)
    values = sweep(model, corrupted_tokens, sites, clean_cache, patching_metric).values
    result = model._to_user(np.ascontiguousarray(values, np.float32))
    if not return_index_df:
        return result
    axes = [{"head": "head_index"}.get(axis, axis) if "pattern" in name else axis for axis in sites.axes]
    return result, _table(list(itertools.product(*map(range, sites.shape))), axes)


get_act_patch_resid_pre = partial(_act_patch, "resid_pre")
get_act_patch_resid_mid = partial(_act_patch, "resid_mid")
get_act_patch_attn_out = partial(_act_patch, "attn_out")
get_act_patch_mlp_out = partial(_act_patch, "mlp_out")
get_act_patch_attn_head_out_by_pos = partial(_act_patch, "attn_head_out_by_pos")
get_act_patch_attn_head_q_by_pos = partial(_act_patch, "attn_head_q_by_pos")
get_act_patch_attn_head_k_by_pos = partial(_act_patch, "attn_head_k_by_pos")
get_act_patch_attn_head_v_by_pos = partial(_act_patch, "attn_head_v_by_pos")
get_act_patch_attn_head_pattern_by_pos = partial(_act_patch, "attn_head_pattern_by_pos")
get_act_patch_attn_head_pattern_dest_src_pos = partial(_act_patch, "attn_head_pattern_dest_src_pos")
get_act_patch_attn_head_out_all_pos = partial(_act_patch, "attn_head_out_all_pos")
get_act_patch_attn_head_q_all_pos = partial(_act_patch, "attn_head_q_all_pos")
get_act_patch_attn_head_k_all_pos = partial(_act_patch, "attn_head_k_all_pos")
get_act_patch_attn_head_v_all_pos = partial(_act_patch, "attn_head_v_all_pos")
get_act_patch_attn_head_pattern_all_pos = partial(_act_patch, "attn_head_pattern_all_pos")


def _stacked(model: Any, arrays: Sequence[Any]) -> Any:
    return model._to_user(np.stack([np.asarray(array) for array in arrays]))


def get_act_patch_attn_head_all_pos_every(model: Any, corrupted_tokens: Any, clean_cache: Any, metric: Measure) -> Any:
    """z, q, k, v and pattern of each head, at all positions: [5, layer, head]."""
    names = [f"attn_head_{part}_all_pos" for part in ("out", "q", "k", "v", "pattern")]
    return _stacked(model, [_act_patch(name, model, corrupted_tokens, clean_cache, metric) for name in names])


def get_act_patch_attn_head_by_pos_every(model: Any, corrupted_tokens: Any, clean_cache: Any, metric: Measure) -> Any:
    """z, q, k, v and pattern of each head by position (the pattern's: the query's): [5, layer, position, head]."""
    names = [f"attn_head_{part}_by_pos" for part in ("out", "q", "k", "v", "pattern")]
    found = [np.asarray(_act_patch(name, model, corrupted_tokens, clean_cache, metric)) for name in names]
    return _stacked(model, [*found[:4], found[4].transpose(0, 2, 1)])


def get_act_patch_block_every(model: Any, corrupted_tokens: Any, clean_cache: Any, metric: Measure) -> Any:
    """resid_pre, attn_out and mlp_out by position: [3, layer, position]."""
    names = ("resid_pre", "attn_out", "mlp_out")
    return _stacked(model, [_act_patch(name, model, corrupted_tokens, clean_cache, metric) for name in names])
