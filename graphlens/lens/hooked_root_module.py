"""A torch module of one's own that is run with hooks and caches."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Self

from torch import nn

from graphlens.errors import InputError
from graphlens.file.names import NamesFilter, select, unknown_hook
from graphlens.lens.caching import CachingModule, HookPairs, blocks_in
from graphlens.lens.hook_points import HookFunction, HookPoint, LensHandle


class HookIntrospectionMixin:
    """``list_hooks`` for any class with a ``hook_dict``: HookPoints by their names. TransformerLens: the same name."""

    def list_hooks(
        self, name_filter: NamesFilter = None, dir: str = "both", including_permanent: bool = True
    ) -> dict[str, list[LensHandle]]:
        """The hooks that there are, by hook point; hook points without any are left out.

        Args:
            name_filter: A hook name, a list of them, or a function name -> bool; None for all.
            dir: "fwd", "bwd" or "both".
            including_permanent: False leaves permanent hooks out.

        Raises:
            UnknownHookPoint: For a name that is none, and a filter that picks nothing.
        """
        points: Mapping[str, HookPoint] = self.hook_dict  # type: ignore[attr-defined]  # an attribute or a property
        found = {}
        for name in select(list(points), name_filter, blocks_in(points)):
            handles = points[name].hooks_of(dir)
            kept = [handle for handle in handles if including_permanent or not handle.is_permanent]
            if kept:
                found[name] = kept
        return found


class HookedRootModule(HookIntrospectionMixin, CachingModule, metaclass=ABCMeta):
    """A torch module of one's own, run with hooks and caches. TransformerLens: the same name.

    A subclass makes its layers, with a HookPoint around each activation, and calls ``setup()`` at the end of its ``__init__``.
    Hooks belong to the module and are there for every thread.

    Attributes:
        mod_dict: Every module by its name.
        hook_dict: Every HookPoint by its name.
        context_level: How many ``with hooks`` blocks are open.
        is_caching: True since caching hooks were added, until ``reset_hooks``.
    """

    def __init__(self, *args: object) -> None:
        super().__init__()
        self.mod_dict: dict[str, nn.Module] = {}
        self.hook_dict: dict[str, HookPoint] = {}
        self.context_level = 0
        self.is_caching = False

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        """A graphlens model counts as one: it has all that this class has."""
        from graphlens.model.methods.edits import EditMethods

        return True if cls is HookedRootModule and issubclass(other, EditMethods) else NotImplemented

    def setup(self) -> None:
        """Gives every module its name, and collects the modules and the hook points."""
        self.mod_dict, self.hook_dict = {}, {}
        for name, module in self.named_modules():
            if not name:
                continue
            module.name = name
            self.mod_dict[name] = module
            if isinstance(module, HookPoint):
                self.hook_dict[name] = module

    def hook_points(self) -> Iterable[HookPoint]:
        """The hook points."""
        return self.hook_dict.values()

    # Removing

    def remove_all_hook_fns(
        self, direction: str = "both", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """Removes hooks at every hook point; see ``HookPoint.remove_hooks``.

        Args:
            direction: "fwd", "bwd" or "both".
            including_permanent: See there.
            level: See there.
        """
        for point in self.hook_points():
            point.remove_hooks(direction, including_permanent, level)

    def clear_contexts(self) -> None:
        """Empties every ``hook.ctx``."""
        for point in self.hook_points():
            point.clear_context()

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: str = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Removes hooks at every hook point, and empties contexts.

        Args:
            clear_contexts: Whether every ``hook.ctx`` is emptied.
            direction: "fwd", "bwd" or "both".
            including_permanent: See ``HookPoint.remove_hooks``.
            level: See there.
        """
        if clear_contexts:
            self.clear_contexts()
        self.remove_all_hook_fns(direction, including_permanent, level)
        self.is_caching = False

    # Adding

    def check_hooks_to_add(
        self,
        hook_point: HookPoint,
        hook_point_name: str,
        hook: HookFunction,
        dir: str = "fwd",
        is_permanent: bool = False,
        prepend: bool = False,
    ) -> None:
        """Does nothing: a subclass may refuse hooks here that ``add_hook`` is to add.

        Args:
            hook_point: The hook point.
            hook_point_name: Its name.
            hook: The function.
            dir: "fwd" or "bwd".
            is_permanent: See ``HookPoint.add_hook``.
            prepend: See there.
        """

    def check_and_add_hook(
        self,
        hook_point: HookPoint,
        hook_point_name: str,
        hook: HookFunction,
        dir: str = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Adds a hook at a hook point, unless ``check_hooks_to_add`` refuses it.

        Args:
            hook_point: The hook point.
            hook_point_name: Its name.
            hook: See ``HookPoint.add_hook``, as for what follows.
            dir: See there.
            is_permanent: See there.
            level: See there.
            prepend: See there.
        """
        self.check_hooks_to_add(hook_point, hook_point_name, hook, dir=dir, is_permanent=is_permanent, prepend=prepend)
        hook_point.add_hook(hook, dir=dir, is_permanent=is_permanent, level=level, prepend=prepend)

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook: HookFunction,
        dir: str = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Adds a hook at one hook point, or at those that a function picks.

        Args:
            name: The hook point's name, or a function name -> bool.
            hook: See ``HookPoint.add_hook``, as for what follows.
            dir: See there.
            is_permanent: See there.
            level: See there.
            prepend: See there.

        Raises:
            UnknownHookPoint: For a name that is none, and for a function that picks nothing.
        """
        for chosen in self.chosen(name):
            self.check_and_add_hook(self.hook_dict[chosen], chosen, hook, dir, is_permanent, level, prepend)

    def add_perma_hook(self, name: str | Callable[[str], bool], hook: HookFunction, dir: str = "fwd") -> None:
        """Adds a hook that ``reset_hooks`` leaves, unless told ``including_permanent=True``.

        Args:
            name: See ``add_hook``.
            hook: See there.
            dir: See there.
        """
        self.add_hook(name, hook, dir, is_permanent=True)

    def _enable_hook(self, name: str | Callable[[str], bool], hook: HookFunction, dir: str) -> None:
        """Adds a hook of the block that is being entered."""
        if isinstance(name, str):
            self._enable_hook_with_name(name=name, hook=hook, dir=dir)
        else:
            self._enable_hooks_for_points(hook_points=self.hook_dict.items(), enabled=name, hook=hook, dir=dir)

    def _enable_hook_with_name(self, name: str, hook: HookFunction, dir: str) -> None:
        """Adds a hook of the block that is being entered, at the hook point of a name."""
        point = self.mod_dict.get(name)
        if point is None:
            raise unknown_hook(name, list(self.hook_dict), blocks_in(self.hook_dict))
        if not hasattr(point, "add_hook"):
            raise InputError(f"{name!r} is a {type(point).__name__} and no HookPoint: hooks are added at hook points.")
        point.add_hook(hook, dir=dir, level=self.context_level)

    def _enable_hooks_for_points(
        self, hook_points: Iterable[tuple[str, HookPoint]], enabled: Callable[[str], bool], hook: HookFunction, dir: str
    ) -> None:
        """Adds a hook of the block that is being entered, at the hook points that a function picks."""
        for name, point in hook_points:
            if enabled(name):
                point.add_hook(hook, dir=dir, level=self.context_level)

    # Running

    @contextmanager
    def hooks(
        self,
        fwd_hooks: HookPairs = (),
        bwd_hooks: HookPairs = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Self]:
        """Adds hooks for the length of a ``with`` block.

        Args:
            fwd_hooks: (hook name or function name -> bool, function) pairs.
            bwd_hooks: The same for gradients.
            reset_hooks_end: False lets them stay.
            clear_contexts: Whether every ``hook.ctx`` is emptied at the end, where hooks go.

        Yields:
            The module.

        Raises:
            UnknownHookPoint: For a name that is none.
        """
        self.context_level += 1
        try:
            for dir, pairs in (("fwd", fwd_hooks), ("bwd", bwd_hooks)):
                for name, hook in pairs:
                    if not isinstance(name, str):
                        self.chosen(name)  # it must pick something
                    self._enable_hook(name=name, hook=hook, dir=dir)
            yield self
        finally:
            if reset_hooks_end:
                self.reset_hooks(clear_contexts, including_permanent=False, level=self.context_level)
            self.context_level -= 1

    def run_with_hooks(
        self,
        *model_args: object,
        fwd_hooks: HookPairs = (),
        bwd_hooks: HookPairs = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: object,
    ) -> object:
        """Runs the module with hooks that are added for this run.

        Args:
            *model_args: What the module is called with.
            fwd_hooks: See ``hooks``, as for what follows. Backward hooks need ``reset_hooks_end=False``, since the backward pass
                comes after the run.
            bwd_hooks: See there.
            reset_hooks_end: See there.
            clear_contexts: See there.
            **model_kwargs: What the module is called with by name.

        Returns:
            What the module gives.

        Raises:
            UnknownHookPoint: For a name that is none.
            InputError: For backward hooks that would be gone before the backward pass.
        """
        bwd_hooks = list(bwd_hooks)
        if bwd_hooks and reset_hooks_end:
            raise InputError(
                "bwd_hooks would never fire: this call ends before backward(). Pass reset_hooks_end=False, or call backward() "
                "inside `with module.hooks(bwd_hooks=...)`."
            )
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(*model_args, **model_kwargs)
