"""Python hooks that keep activations, as TransformerLens's ``get_caching_hooks`` makes them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, cast

import numpy as np

from graphlens.analysis.arrays import ArrayT, is_tensor
from graphlens.analysis.slices import Slice, SliceInput, of_positions
from graphlens.errors import InputError
from graphlens.file.names import JOINT_AXES, NamesFilter, select
from graphlens.model.hook_calls import Chosen, HookFunction
from graphlens.model.hooks import HookPoint

if TYPE_CHECKING:
    from graphlens.model.runner import Runner

Pairs = list[tuple[str, HookFunction]]


def caching_hooks(
    runner: Runner[ArrayT],
    names_filter: NamesFilter,
    incl_bwd: bool,
    remove_batch_dim: bool,
    cache: dict[str, ArrayT] | None,
    pos_slice: SliceInput = None,
) -> tuple[dict[str, ArrayT], Pairs, Pairs]:
    """Hooks that put what they see into a dictionary.

    Args:
        runner: Runs the model.
        names_filter: Which activations; see ``HookedTransformer.get_caching_hooks``, as for what follows.
        incl_bwd: See there.
        remove_batch_dim: See there.
        cache: See there.
        pos_slice: See there.

    Returns:
        (the dictionary, forward hooks, backward hooks).

    Raises:
        UnknownHookPoint: For a filter that matches nothing.
    """
    cache = {} if cache is None else cache
    chosen = select(runner.names(), names_filter, runner.config.n_layers)
    entries = runner.engine.hooks(runner.plan())
    positions = None if pos_slice is None else Slice.unwrap(pos_slice)

    def keep(value: ArrayT, hook: HookPoint, is_backward: bool = False) -> None:
        kept = cast(ArrayT, value.detach()) if is_tensor(value) else value
        axes = entries[hook.name].axes
        if positions is not None:
            if axes[0] in JOINT_AXES:
                raise InputError(
                    f"pos_slice cannot be taken of {hook.name!r} by a hook: prompts and positions are one axis there. Pass it to "
                    "run_with_cache, or leave that hook point out."
                )
            array = runner.border.from_user(kept)
            kept = runner.border.to_user(np.array(of_positions(array, axes, positions, array.shape[:2])))
        cache[f"{hook.name}_grad" if is_backward else hook.name] = kept[0] if remove_batch_dim else kept

    forward: Pairs = [(Chosen(name), functools.partial(keep, is_backward=False)) for name in chosen]
    if not incl_bwd:
        return cache, forward, []
    possible = runner.differentiable(runner.plan())
    return cache, forward, [(Chosen(n), functools.partial(keep, is_backward=True)) for n in chosen if n in possible]
