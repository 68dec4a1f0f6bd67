"""What HookedTransformer has of TransformerLens's HookedRootModule: its hooks by other names, and hooks that keep activations.

These functions are methods: ``EditMethods`` takes them in by their names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from graphlens.analysis.arrays import ArrayT
from graphlens.analysis.slices import SliceInput
from graphlens.errors import checked_number
from graphlens.file.names import NamesFilter, select, unknown_hook
from graphlens.model.caching import Pairs, caching_hooks
from graphlens.model.hook_calls import HookFunction
from graphlens.model.hooks import BACKWARD, FORWARD, HookPoint
from graphlens.model.methods.torch_like import to
from graphlens.model.ran import ActiveHook

if TYPE_CHECKING:
    from graphlens.model.runner import Runner


class Rooted(Protocol[ArrayT]):
    """A model, by what these methods ask of it."""

    runner: Runner[ArrayT]


# Hooks, as HookedRootModule has them


def remove_all_hook_fns(
    self: Rooted[ArrayT], direction: str = "both", including_permanent: bool = False, level: int | None = None
) -> None:
    """Removes hooks as ``reset_hooks`` does, and leaves every ``hook.ctx``.

    Args:
        direction: "fwd", "bwd" or "both".
        including_permanent: Whether permanent hooks go too.
        level: Only those of one level.

    Raises:
        InputError: For another direction.
    """
    self.runner.hooks.reset(including_permanent, level, dir=direction)


def check_hooks_to_add(
    self: Rooted[ArrayT],
    hook_point: HookPoint,
    hook_point_name: str,
    hook: HookFunction,
    dir: str = "fwd",
    is_permanent: bool = False,
    prepend: bool = False,
) -> None:
    """Refuses a hook at a hook point that there is not. TransformerLens: the same name.

    Args:
        hook_point: The hook point.
        hook_point_name: Its name.
        hook: See ``add_hook``, as for what follows.
        dir: See there.
        is_permanent: See there.
        prepend: See there.

    Raises:
        UnknownHookPoint: If this model has no hook point of that name now.
    """
    if self.runner.hooks.find(hook_point_name) is None:
        raise unknown_hook(hook_point_name, self.runner.names(), self.runner.config.n_layers)


def check_and_add_hook(
    self: Rooted[ArrayT],
    hook_point: HookPoint,
    hook_point_name: str,
    hook: HookFunction,
    dir: str = "fwd",
    is_permanent: bool = False,
    level: int | None = None,
    prepend: bool = False,
) -> None:
    """Adds a hook at a hook point, once it is found to be there. TransformerLens: the same name.

    Args:
        hook_point: The hook point.
        hook_point_name: Its name.
        hook: See ``add_hook``, as for what follows.
        dir: See there.
        is_permanent: See there.
        level: See there.
        prepend: See there.

    Raises:
        UnknownHookPoint: If this model has no hook point of that name now.
    """
    check_hooks_to_add(self, hook_point, hook_point_name, hook, dir, is_permanent, prepend)
    hook_point.add_hook(hook, dir, is_permanent, level, prepend)


def list_hooks(
    self: Rooted[ArrayT], name_filter: NamesFilter = None, dir: str = "both", including_permanent: bool = True
) -> dict[str, list[ActiveHook]]:
    """The hooks that are active in this thread, by hook point; hook points without any are left out.

    Args:
        name_filter: Which hook points; see ``names_filter`` in ``run_with_cache``.
        dir: "fwd", "bwd" or "both".
        including_permanent: False leaves permanent hooks out.
    """
    asked = select(self.runner.names(), name_filter, self.runner.config.n_layers)
    found = {}
    for name in asked:
        point = self.runner.hooks.point(name)
        hooks = [
            *(point.fwd_hooks if dir in (FORWARD, "both") else []),
            *(point.bwd_hooks if dir in (BACKWARD, "both") else []),
        ]
        kept = [hook for hook in hooks if including_permanent or not hook.is_permanent]
        if kept:
            found[name] = kept
    return found


def context_level(self: Rooted[ArrayT]) -> int:
    """How many ``with model.hooks`` blocks are open in this thread."""
    return self.runner.hooks.depth


# Hooks that keep activations


def get_caching_hooks(
    self: Rooted[ArrayT],
    names_filter: NamesFilter = None,
    incl_bwd: bool = False,
    device: object = None,
    remove_batch_dim: bool = False,
    cache: dict[str, ArrayT] | None = None,
    pos_slice: SliceInput = None,
) -> tuple[dict[str, ArrayT], Pairs, Pairs]:
    """Hooks that keep activations in a dictionary, to be added by the user. TransformerLens: the same name.

    Args:
        names_filter: Which activations; see ``run_with_cache``.
        incl_bwd: Whether to make backward hooks too, which keep each gradient as ``<name>_grad``.
        device: TransformerLens's; activations stay where the model runs.
        remove_batch_dim: Whether the first entry of the batch axis alone is kept, without the axis.
        cache: The dictionary; None for a new one.
        pos_slice: Keeps those positions alone; see ``run_with_cache``.

    Returns:
        (the dictionary, forward hooks, backward hooks), the hooks as (name, function) pairs.

    Raises:
        UnknownHookPoint: For a filter that matches nothing.
        InputError: For another ``device``.
    """
    _ensure_device(self, device)
    options = (
        checked_number(incl_bwd, "incl_bwd", bool),
        checked_number(remove_batch_dim, "remove_batch_dim", bool),
    )
    return caching_hooks(self.runner, names_filter, *options, cache, pos_slice)


def add_caching_hooks(
    self: Rooted[ArrayT],
    names_filter: NamesFilter = None,
    incl_bwd: bool = False,
    device: object = None,
    remove_batch_dim: bool = False,
    cache: dict[str, ArrayT] | None = None,
) -> dict[str, ArrayT]:
    """Adds hooks that keep activations, until ``reset_hooks``. TransformerLens: the same name.

    Args:
        names_filter: See ``get_caching_hooks``, as for what follows.
        incl_bwd: See there.
        device: See there.
        remove_batch_dim: See there.
        cache: See there.

    Returns:
        The dictionary, which later runs fill.

    Raises:
        UnknownHookPoint: For a filter that matches nothing.
        InputError: For another ``device``.
    """
    cache, forward, backward = get_caching_hooks(self, names_filter, incl_bwd, device, remove_batch_dim, cache)
    for direction, pairs in ((FORWARD, forward), (BACKWARD, backward)):
        for name, hook in pairs:
            self.runner.hooks.add(name, hook, direction)
    return cache


def cache_all(
    self: Rooted[ArrayT],
    cache: dict[str, ArrayT] | None,
    incl_bwd: bool = False,
    device: object = None,
    remove_batch_dim: bool = False,
) -> None:
    """``add_caching_hooks`` for every activation, into a dictionary of the user's. TransformerLens: the same name.

    Args:
        cache: The dictionary.
        incl_bwd: See ``get_caching_hooks``, as for what follows.
        device: See there.
        remove_batch_dim: See there.
    """
    add_caching_hooks(self, None, incl_bwd, device, remove_batch_dim, cache)


def cache_some(
    self: Rooted[ArrayT],
    cache: dict[str, ArrayT] | None,
    names: Callable[[str], bool],
    incl_bwd: bool = False,
    device: object = None,
    remove_batch_dim: bool = False,
) -> None:
    """``add_caching_hooks`` for some activations, into a dictionary of the user's. TransformerLens: the same name.

    Args:
        cache: The dictionary.
        names: A function name -> bool; or what ``names_filter`` may be.
        incl_bwd: See ``get_caching_hooks``, as for what follows.
        device: See there.
        remove_batch_dim: See there.

    Raises:
        UnknownHookPoint: For a function that picks nothing.
    """
    add_caching_hooks(self, names, incl_bwd, device, remove_batch_dim, cache)


def _ensure_device(self: Rooted[ArrayT], device: object) -> None:
    """Refuses to keep activations on another device than the model's."""
    if device is not None:
        to(self, device)
