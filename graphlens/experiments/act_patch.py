"""TransformerLens's activation patching: the same functions, arguments and shapes, over sweeps that recompute less.

``get_act_patch_*`` take (model, corrupted_tokens, clean_cache, patching_metric). A metric of graphlens.metrics lets them
compute only the logits it reads; a function of logits works too, and costs their unembedding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT
from graphlens.analysis.metric import Metric
from graphlens.analysis.sites import GRIDS, Site, Sites, grid
from graphlens.analysis.sources import Cache, ensure_same_side
from graphlens.errors import InputError, checked_number, is_one_of
from graphlens.experiments.patch_setters import (
    SITE_FIELDS,
    layer_head_dest_src_pos_pattern_patch_setter,
    layer_head_pattern_patch_setter,
    layer_head_pos_pattern_patch_setter,
    layer_head_vector_patch_setter,
    layer_pos_head_vector_patch_setter,
    layer_pos_patch_setter,
)
from graphlens.experiments.sweep import sweep
from graphlens.experiments.sweep_metrics import Measure, one_number
from graphlens.file.names import BLOCK, get_act_name, split_name
from graphlens.model.text import is_text

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

    from graphlens.model.hooked_transformer import HookedTransformer
    from graphlens.model.hooks import HookPoint
    from graphlens.model.text import Input

Clean = Mapping[Any, Any]  # the clean run's cache
Setter = Callable[[Any, Sequence[int], Any], Any]
AXES = ("layer", "pos", "head_index", "head", "src_pos", "dest_pos")


def generic_activation_patch(
    model: HookedTransformer[ArrayT],
    corrupted_tokens: Input[ArrayT],
    clean_cache: Clean,
    patching_metric: Measure,
    patch_setter: Setter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: pd.DataFrame | None = None,
    return_index_df: bool = False,
) -> ArrayT | tuple[ArrayT, pd.DataFrame]:
    """Patches an activation at many indices, one at a time, and measures each.

    TransformerLens: ``patching.generic_activation_patch``.

    Args:
        model: The model.
        corrupted_tokens: Tokens [b, p] or text, as ``forward`` takes them.
        clean_cache: The clean run's cache.
        patching_metric: A function of logits [b, p, V] to a number, or one of graphlens.metrics.
        patch_setter: ``patch_setter(corrupted_activation, index, clean_activation)`` edits the first in place or returns
            it. Any function will do, and takes one forward with a Python hook per index; this module's own are
            recomputed as ``sweep`` does.
        activation_name: A short name ("resid_pre", "z").
        index_axis_names: Which of "layer", "pos", "head", "head_index", "dest_pos", "src_pos" to run over.
        index_df: A pandas table of indices instead, whose results are flat.
        return_index_df: Whether that table is returned too (pandas).

    Returns:
        float32, shaped like the index axes; with ``return_index_df`` the pair of it and the table.

    Raises:
        UnknownHookPoint: For a hook point that the model or the cache lacks.
        InputError: For indices that are not there, and what ``sweep`` refuses.
    """
    indices, shape, columns = _indices(model, corrupted_tokens, index_axis_names, index_df, activation_name)
    parts = SITE_FIELDS.get(patch_setter)
    if parts is not None:
        short = [dict(zip(parts, index[1:], strict=True)) for index in indices]
        sites = tuple(Site(activation_name, index[0], **part) for index, part in zip(indices, short, strict=True))
        labels = {"site": tuple(map(str, range(len(sites))))}
        found = sweep(model, corrupted_tokens, Sites(sites, ("site",), labels), clean_cache, patching_metric).values
    else:
        found = _one_by_one(
            model, corrupted_tokens, clean_cache, patching_metric, patch_setter, activation_name, indices
        )
    result = model.border.to_user(np.ascontiguousarray(found.reshape(shape), np.float32))
    return (result, _table(indices, columns)) if return_index_df else result


def _one_by_one(
    model: HookedTransformer[ArrayT],
    tokens: Input[ArrayT],
    cache: Clean,
    metric: Measure,
    setter: Setter,
    name: str,
    indices: Sequence[Sequence[int]],
) -> Array:
    values = []
    request = model.runner.whole_prompts(tokens)
    ensure_same_side(Cache(cache), request.mask)
    ids = model.border.to_user(request.need_tokens())
    metric = model.runner.bound(metric, request.mask) if isinstance(metric, Metric) else metric
    for index in indices:
        clean = cache[hook_name := get_act_name(name, index[0])]

        def patch(activation: ArrayT, hook: HookPoint, index: Sequence[int] = index, clean: ArrayT = clean) -> ArrayT:
            changed: ArrayT = setter(activation, index, clean)
            return changed

        logits = model.run_with_hooks(ids, fwd_hooks=[(hook_name, patch)], attention_mask=request.mask)
        values.append(float(one_number(metric(logits))))
    if np.isnan(values).any():
        raise InputError(f"the metric is NaN at index {indices[int(np.isnan(values).argmax())]}.")
    return np.asarray(values)


def _indices(
    model: HookedTransformer[ArrayT],
    tokens: Input[ArrayT],
    names: Sequence[str] | None,
    table: pd.DataFrame | None,
    activation: str,
) -> tuple[list[tuple[int, ...]], tuple[int, ...], list[str]]:
    """(every index, the result's shape, the axes)."""
    if (names is None) == (table is None):
        raise InputError("give either index_axis_names or index_df.")
    if names is None or table is not None:
        assert table is not None
        rows = [tuple(checked_number(i, "an index of index_df") for i in row) for row in table.to_numpy().tolist()]
        if not rows:
            raise InputError("index_df is empty: there is nothing to patch.")
        return rows, (len(rows),), list(table.columns)
    unknown = [name for name in names if name not in AXES]
    if unknown or not names or names[0] != "layer":
        raise InputError(f"index_axis_names are 'layer' and then some of {', '.join(AXES[1:])}, not {list(names)}.")
    ranges = _ranges(model, tokens, activation)
    sizes = tuple(len(ranges[{"head_index": "head"}.get(name, name)]) for name in names)
    return list(itertools.product(*map(range, sizes))), sizes, list(names)


def _ranges(model: HookedTransformer[ArrayT], tokens: Input[ArrayT], activation: str) -> dict[str, range]:
    cfg, text = model.runner.config, model.runner.text
    length = (text.padded(tokens) if is_text(tokens) else text.ids(tokens)).shape[-1]
    few = "key_value_head_index" in BLOCK.get(split_name(get_act_name(activation, 0))[1], ())
    positions = dict.fromkeys(("pos", "dest_pos", "src_pos"), range(length))
    return {"layer": range(cfg.n_layers), "head": range(cfg.n_key_value_heads if few else cfg.n_heads), **positions}


def make_df_from_ranges(column_max_ranges: Sequence[int], column_names: Sequence[str]) -> pd.DataFrame:
    """A pandas table with a row for each combination of indices. TransformerLens: ``patching.make_df_from_ranges``.

    Args:
        column_max_ranges: How many indices each column has, from 0.
        column_names: What the columns are called.

    Returns:
        The table, the last column varying fastest.

    Raises:
        InputError: Without pandas, or for another number of names.
    """
    sizes = [checked_number(size, "column_max_ranges", least=0) for size in column_max_ranges]
    if len(sizes) != len(column_names):
        raise InputError(f"{len(sizes)} ranges and {len(column_names)} names: give a name for each.")
    return _table(list(itertools.product(*map(range, sizes))), list(column_names))


def _table(rows: Sequence[Sequence[int]], columns: Sequence[str]) -> pd.DataFrame:
    try:
        import pandas
    except ImportError as error:
        raise InputError("tables of indices need pandas: pip install pandas.") from error
    return pandas.DataFrame(list(rows), columns=list(columns))


def act_patch_sites(
    model: HookedTransformer[ArrayT],
    corrupted_tokens: Input[ArrayT],
    name: str,
    labels: Mapping[str, Sequence[str]] | None = None,
) -> Sites:
    """The sites of a ``get_act_patch_*`` function.

    Args:
        model: The model.
        corrupted_tokens: The prompts, whose length counts.
        name: The rest of the function's name ("resid_pre", "attn_head_out_all_pos").
        labels: What to call an axis's entries in the result: ``{"pos": model.to_str_tokens(prompt)}``.

    Returns:
        The sites, with the axes of that function's result.

    Raises:
        InputError: For a name that is none.
    """
    if not is_one_of(name, GRIDS):
        raise InputError(f"no sites are called {name!r}: there are {', '.join(GRIDS)}.")
    activation, axes = GRIDS[name]
    return grid(activation, axes, _ranges(model, corrupted_tokens, activation), {} if labels is None else labels)


class ActPatch(Protocol):
    """A ``get_act_patch_*`` function: TransformerLens's arguments and results."""

    @overload
    def __call__(
        self,
        model: HookedTransformer[ArrayT],
        corrupted_tokens: Input[ArrayT],
        clean_cache: Clean,
        patching_metric: Measure,
        return_index_df: Literal[False] = False,
        *,
        patch_setter: Setter = ...,
        activation_name: str = ...,
        index_axis_names: Sequence[str] | None = ...,
        index_df: pd.DataFrame | None = ...,
    ) -> ArrayT: ...

    @overload
    def __call__(
        self,
        model: HookedTransformer[ArrayT],
        corrupted_tokens: Input[ArrayT],
        clean_cache: Clean,
        patching_metric: Measure,
        return_index_df: Literal[True],
        *,
        patch_setter: Setter = ...,
        activation_name: str = ...,
        index_axis_names: Sequence[str] | None = ...,
        index_df: pd.DataFrame | None = ...,
    ) -> tuple[ArrayT, pd.DataFrame]: ...


# The setter of a grid, by its activation and its axes after the layer.
_SETTERS: dict[tuple[bool, tuple[str, ...]], Setter] = {
    (False, ("pos",)): layer_pos_patch_setter,
    (False, ("pos", "head")): layer_pos_head_vector_patch_setter,
    (False, ("head",)): layer_head_vector_patch_setter,
    (True, ("head",)): layer_head_pattern_patch_setter,
    (True, ("head", "dest_pos")): layer_head_pos_pattern_patch_setter,
    (True, ("head", "dest_pos", "src_pos")): layer_head_dest_src_pos_pattern_patch_setter,
}


def _act_patch(name: str, what: str) -> ActPatch:
    """The function that patches over the grid of that name."""
    activation, axes = GRIDS[name]
    setter = _SETTERS[activation == "pattern", tuple(axes[1:])]

    def act_patch(
        model: HookedTransformer[ArrayT],
        corrupted_tokens: Input[ArrayT],
        clean_cache: Clean,
        patching_metric: Measure,
        return_index_df: bool = False,
        *,
        patch_setter: Setter = setter,
        activation_name: str = activation,
        index_axis_names: Sequence[str] | None = axes,
        index_df: pd.DataFrame | None = None,
    ) -> Any:
        if index_df is not None or (patch_setter, activation_name, index_axis_names) != (setter, activation, axes):
            given = (patch_setter, activation_name, None if index_df is not None else index_axis_names, index_df)
            return generic_activation_patch(
                model, corrupted_tokens, clean_cache, patching_metric, *given, return_index_df=return_index_df
            )
        result = model.border.to_user(_patched(name, model, corrupted_tokens, clean_cache, patching_metric))
        if not return_index_df:
            return result
        sites = act_patch_sites(model, corrupted_tokens, name)
        columns = [{"head": "head_index"}.get(axis, axis) if "pattern" in name else axis for axis in sites.axes]
        return result, _table(list(itertools.product(*map(range, sites.shape))), columns)

    act_patch.__name__ = act_patch.__qualname__ = f"get_act_patch_{name}"
    act_patch.__doc__ = f"""Patches {what}, one after the other. TransformerLens: the same name.

    Args:
        model: The model.
        corrupted_tokens: Tokens [b, p] or text, as ``forward`` takes them.
        clean_cache: The clean run's cache.
        patching_metric: A function of logits [b, p, V] to a number, or one of graphlens.metrics.
        return_index_df: Whether a table of the indices is returned too (pandas).
        patch_setter: Another setter, as for the next three: see ``generic_activation_patch``.
        activation_name: Another activation.
        index_axis_names: Other axes.
        index_df: A pandas table of indices in place of all.

    Returns:
        The metric of each patched run, float32 [{", ".join(axes)}].

    Raises:
        UnknownHookPoint: Where the cache lacks a hook point.
        InputError: For what does not fit the model, the prompts or each other.
    """
    return act_patch


def _patched(
    name: str,
    model: HookedTransformer[ArrayT],
    corrupted_tokens: Input[ArrayT],
    clean_cache: Clean,
    patching_metric: Measure,
) -> Array:
    sites = act_patch_sites(model, corrupted_tokens, name)
    values = sweep(model, corrupted_tokens, sites, clean_cache, patching_metric).values
    return np.ascontiguousarray(values, np.float32)


get_act_patch_resid_pre = _act_patch("resid_pre", "the residual stream before each layer, by position")
get_act_patch_resid_mid = _act_patch("resid_mid", "the residual stream between attention and MLP, by position")
get_act_patch_attn_out = _act_patch("attn_out", "each layer's attention output, by position")
get_act_patch_mlp_out = _act_patch("mlp_out", "each layer's MLP output, by position")
get_act_patch_attn_head_out_by_pos = _act_patch("attn_head_out_by_pos", "each head's output z, by position")
get_act_patch_attn_head_q_by_pos = _act_patch("attn_head_q_by_pos", "each head's queries, by position")
get_act_patch_attn_head_k_by_pos = _act_patch("attn_head_k_by_pos", "each head's keys, by position")
get_act_patch_attn_head_v_by_pos = _act_patch("attn_head_v_by_pos", "each head's values, by position")
get_act_patch_attn_head_pattern_by_pos = _act_patch(
    "attn_head_pattern_by_pos", "each head's pattern, by the query's position"
)
get_act_patch_attn_head_pattern_dest_src_pos = _act_patch(
    "attn_head_pattern_dest_src_pos", "each entry of each head's pattern"
)
get_act_patch_attn_head_out_all_pos = _act_patch(
    "attn_head_out_all_pos", "each head's output z, at all positions together"
)
get_act_patch_attn_head_q_all_pos = _act_patch("attn_head_q_all_pos", "each head's queries, at all positions together")
get_act_patch_attn_head_k_all_pos = _act_patch("attn_head_k_all_pos", "each head's keys, at all positions together")
get_act_patch_attn_head_v_all_pos = _act_patch("attn_head_v_all_pos", "each head's values, at all positions together")
get_act_patch_attn_head_pattern_all_pos = _act_patch("attn_head_pattern_all_pos", "each head's whole pattern")


class ActPatchEvery(Protocol):
    """A ``get_act_patch_*_every`` function: TransformerLens's arguments and results."""

    def __call__(
        self, model: HookedTransformer[ArrayT], corrupted_tokens: Input[ArrayT], clean_cache: Clean, metric: Measure
    ) -> ArrayT:
        """Patches over several grids."""


def _every(name: str, what: str, grids: Sequence[str]) -> ActPatchEvery:
    """The function that patches over the grids of those names, one after the other, and lays all out as the first."""
    axes = GRIDS[grids[0]][1]

    def every(
        model: HookedTransformer[ArrayT], corrupted_tokens: Input[ArrayT], clean_cache: Clean, metric: Measure
    ) -> ArrayT:
        cfg, found = model.runner.config, []
        if "head" in axes and cfg.n_heads != (few := cfg.n_key_value_heads):
            calls = ", ".join(f"get_act_patch_{grid_name}" for grid_name in grids)
            raise InputError(f"{cfg.n_heads} heads and {few} of keys and values do not stack: call {calls} instead.")
        for grid_name in grids:
            own = [{"dest_pos": "pos"}.get(axis, axis) for axis in GRIDS[grid_name][1]]
            values = _patched(grid_name, model, corrupted_tokens, clean_cache, metric)
            found.append(values.transpose([own.index(axis) for axis in axes]))
        return model.border.to_user(np.stack(found))

    every.__name__ = every.__qualname__ = f"get_act_patch_{name}_every"
    every.__doc__ = f"""Patches {what}. TransformerLens: the same name.

    Args:
        model: The model.
        corrupted_tokens: Tokens [b, p] or text, as ``forward`` takes them.
        clean_cache: The clean run's cache.
        metric: A function of logits [b, p, V] to a number, or one of graphlens.metrics.

    Returns:
        The metric of each patched run, float32 [{len(grids)}, {", ".join(axes)}].

    Raises:
        UnknownHookPoint: Where the cache lacks a hook point.
        InputError: For what does not fit the model, the prompts or each other, and where heads share keys and values.
    """
    return every


_HEAD_PARTS = ("out", "q", "k", "v", "pattern")
get_act_patch_attn_head_all_pos_every = _every(
    "attn_head_all_pos",
    "z, q, k, v and pattern of each head, at all positions",
    [f"attn_head_{part}_all_pos" for part in _HEAD_PARTS],
)
get_act_patch_attn_head_by_pos_every = _every(
    "attn_head_by_pos",
    "z, q, k, v and pattern of each head by position (the query's)",
    [f"attn_head_{part}_by_pos" for part in _HEAD_PARTS],
)
get_act_patch_block_every = _every(
    "block", "resid_pre, attn_out and mlp_out by position", ("resid_pre", "attn_out", "mlp_out")
)
