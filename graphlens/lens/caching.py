"""Hooks that keep the activations of one's own torch modules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import nn

from graphlens.analysis.slices import Slice, SliceInput
from graphlens.errors import InputError
from graphlens.file.names import NamesFilter, select, split_name
from graphlens.lens.hook_points import DeviceType, HookFunction, HookPoint

HookPairs = Iterable[tuple[str | Callable[[str], bool], HookFunction]]
_PER_HEAD = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_result")  # [..., pos, head, ...]
_Made = tuple[dict[str, torch.Tensor], list[tuple[str, HookFunction]], list[tuple[str, HookFunction]]]


class CachingModule(nn.Module):  # type: ignore[misc]
    """The part of HookedRootModule that keeps activations.

    Attributes:
        hook_dict: Every HookPoint by its name.
        is_caching: True since caching hooks were made, until ``reset_hooks``.
    """

    hook_dict: dict[str, HookPoint]
    is_caching: bool

    def hooks(
        self, fwd_hooks: HookPairs, bwd_hooks: HookPairs, reset_hooks_end: bool, clear_contexts: bool
    ) -> AbstractContextManager[object]:
        """See HookedRootModule."""
        raise NotImplementedError

    def chosen(self, names: NamesFilter) -> list[str]:
        """The names of hook points that a filter picks.

        Args:
            names: A hook name, a list of them, or a function name -> bool; None for all.

        Raises:
            UnknownHookPoint: For a name that is none, and a filter that picks nothing.
        """
        return select(list(self.hook_dict), names, blocks_in(self.hook_dict))

    def run_with_cache(
        self,
        *model_args: object,
        names_filter: NamesFilter = None,
        device: DeviceType = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: SliceInput = None,
        **model_kwargs: object,
    ) -> tuple[object, dict[str, torch.Tensor]]:
        """Runs the module and keeps activations.

        Args:
            *model_args: What the module is called with.
            names_filter: Which activations: a hook name, a list of names, or a function name -> bool; None for all.
            device: Where they are kept; None for where they are.
            remove_batch_dim: Whether their first axis is dropped, of a batch of one.
            incl_bwd: Whether ``backward()`` is called on what the module gives, and each gradient kept as ``<name>_grad``.
            reset_hooks_end: False lets the hooks stay that keep them.
            clear_contexts: Whether every ``hook.ctx`` is emptied after the run.
            pos_slice: Keeps those positions of each activation (an int, slice, tuple, array or Slice).
            **model_kwargs: What the module is called with by name.

        Returns:
            (what the module gives, hook name -> activation).

        Raises:
            UnknownHookPoint: For a name or filter that matches nothing.
        """
        cache, forward, backward = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, pos_slice=pos_slice
        )
        with self.hooks(forward, backward, reset_hooks_end, clear_contexts):
            output = self(*model_args, **model_kwargs)
            if incl_bwd:
                output.backward()
        return output, cache

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: DeviceType = None,
        remove_batch_dim: bool = False,
        cache: dict[str, torch.Tensor] | None = None,
        pos_slice: SliceInput = None,
    ) -> _Made:
        """Hooks that keep activations in a dictionary, to be added by the user.

        Args:
            names_filter: See ``run_with_cache``, as for what follows.
            incl_bwd: Whether to make backward hooks too.
            device: See there.
            remove_batch_dim: See there.
            cache: The dictionary; None for a new one.
            pos_slice: See there.

        Returns:
            (the dictionary, forward hooks, backward hooks), the hooks as (name, function) pairs.

        Raises:
            UnknownHookPoint: For a name or filter that matches nothing.
        """
        cache = {} if cache is None else cache
        names, positions = self.chosen(names_filter), Slice.unwrap(pos_slice)
        self.is_caching = True

        def keep(tensor: torch.Tensor, hook: HookPoint, is_backward: bool) -> None:
            if hook.name is None:
                raise InputError("this hook point has no name: call setup() at the end of the root module's __init__.")
            kept = tensor.detach() if device is None else tensor.detach().to(device)
            if remove_batch_dim:
                kept = kept[0]
            axis = -3 if hook.name.endswith(_PER_HEAD) else -2
            if tensor.dim() >= -axis and pos_slice is not None:
                kept = positions.apply(kept, axis)
            cache[f"{hook.name}_grad" if is_backward else hook.name] = kept

        forward = [(name, functools.partial(keep, is_backward=False)) for name in names]
        backward = [(name, functools.partial(keep, is_backward=True)) for name in names] if incl_bwd else []
        return cache, [*forward], [*backward]

    def add_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: DeviceType = None,
        remove_batch_dim: bool = False,
        cache: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Adds hooks that keep activations, until ``reset_hooks``.

        Args:
            names_filter: See ``get_caching_hooks``, as for what follows.
            incl_bwd: See there.
            device: See there.
            remove_batch_dim: See there.
            cache: See there.

        Returns:
            The dictionary, which later runs fill.
        """
        cache, forward, backward = self.get_caching_hooks(names_filter, incl_bwd, device, remove_batch_dim, cache)
        for dir, pairs in (("fwd", forward), ("bwd", backward)):
            for name, hook in pairs:
                self.hook_dict[name].add_hook(hook, dir)
        return cache

    def cache_all(
        self,
        cache: dict[str, torch.Tensor] | None,
        incl_bwd: bool = False,
        device: DeviceType = None,
        remove_batch_dim: bool = False,
    ) -> None:
        """``add_caching_hooks`` for every activation, into a dictionary of the user's.

        Args:
            cache: The dictionary.
            incl_bwd: See ``get_caching_hooks``, as for what follows.
            device: See there.
            remove_batch_dim: See there.
        """
        self.add_caching_hooks(None, incl_bwd, device, remove_batch_dim, cache)

    def cache_some(
        self,
        cache: dict[str, torch.Tensor] | None,
        names: Callable[[str], bool],
        incl_bwd: bool = False,
        device: DeviceType = None,
        remove_batch_dim: bool = False,
    ) -> None:
        """``add_caching_hooks`` for some activations, into a dictionary of the user's.

        Args:
            cache: The dictionary.
            names: A function name -> bool.
            incl_bwd: See ``get_caching_hooks``, as for what follows.
            device: See there.
            remove_batch_dim: See there.
        """
        self.add_caching_hooks(names, incl_bwd, device, remove_batch_dim, cache)


def blocks_in(names: Iterable[str]) -> int:
    """How many blocks hook points are in."""
    return 1 + max((layer for name in names if (layer := split_name(name)[0]) is not None), default=0)
