"""Hook points for one's own torch modules.

A graphlens model has hook points of its own, in its graph (``graphlens.model.hook_point``). They count as instances of this
class, so that code which asks ``isinstance(hook, HookPoint)`` need not know which kind it is given.
"""

from __future__ import annotations

import functools
from abc import ABCMeta
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from graphlens.errors import InputError, is_one_of
from graphlens.file.names import NamesFilter as NamesFilter
from graphlens.file.names import split_name
from graphlens.model import hook_point

# Called as ``function(activation, hook=HookPoint)``: what it returns replaces the activation, None keeps it.
HookFunction = Callable[..., object]
DeviceType = torch.device | str | None
_DIRECTIONS = ("fwd", "bwd", "both")


class Conversion(Protocol):
    """Another form of activations, for hooks to see; see ``HookPoint.enable_reshape``."""

    def convert(self, value: object, /) -> object:
        """The form that hooks see."""

    def revert(self, value: object, /) -> object:
        """The activation again, from that form."""


@dataclass
class LensHandle:
    """A hook at a HookPoint.

    Attributes:
        hook: Torch's handle, which removes it.
        is_permanent: True if resetting leaves it.
        context_level: The depth of the ``with`` block that it belongs to, from 1; None outside blocks.
        user_hook: The function.
    """

    hook: RemovableHandle
    is_permanent: bool = False
    context_level: int | None = None
    user_hook: HookFunction | None = None

    def goes(self, including_permanent: bool, level: int | None) -> bool:
        """True if a reset with these arguments removes the hook.

        Args:
            including_permanent: True removes permanent hooks too.
            level: The depth of the ``with`` block whose hooks go; None for all.
        """
        return including_permanent or (not self.is_permanent and level in (None, self.context_level))


class _Alias:
    """A hook point under another name, as a hook that was added with ``alias_names`` sees it."""

    def __init__(self, name: str, point: HookPoint) -> None:
        self.name, self._point = name, point

    def __getattr__(self, name: str) -> object:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._point, name)

    def layer(self) -> int:
        """The number of the block in the name."""
        return _layer(self.name)


class HookPoint(nn.Module, metaclass=ABCMeta):  # type: ignore[misc]
    """A module that gives back what it is given, after the hooks that were added to it. TransformerLens: the same name.

    Attributes:
        name: Its name in the root module, which ``HookedRootModule.setup`` sets; None before.
        ctx: A dictionary for the user's own things, kept until ``clear_context``.
        fwd_hooks: The hooks of the forward pass, in the order in which they run.
        bwd_hooks: Those of the backward pass.
        hook_conversion: What hooks see through; see ``enable_reshape``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name: str | None = None
        self.ctx: dict[str, object] = {}
        self.fwd_hooks: list[LensHandle] = []
        self.bwd_hooks: list[LensHandle] = []
        self.hook_conversion: Conversion | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor itself.

        Args:
            x: The tensor, of any shape.

        Returns:
            The same object; hooks of the module see it, and may replace it.
        """
        return x

    def add_hook(
        self,
        hook: HookFunction,
        dir: str = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        alias_names: Sequence[str] | None = None,
    ) -> None:
        """Adds a hook.

        Args:
            hook: Called as ``hook(activation, hook=self)``, or with a gradient; what it returns takes its place, None keeps it.
            dir: "fwd" or "bwd".
            is_permanent: True if ``remove_hooks`` leaves it.
            level: A number that ``remove_hooks(level=)`` picks it by.
            prepend: Whether it runs before the hooks that are there.
            alias_names: The hook is called once for each of these, with a hook point of that name.

        Raises:
            InputError: For another ``dir``.
        """
        if not is_one_of(dir, ("fwd", "bwd")):
            raise InputError(f"dir must be 'fwd' or 'bwd', not {dir!r}.")
        points = [self] if alias_names is None else [_Alias(name, self) for name in alias_names]

        def through(value: object) -> object:
            """What the hook makes of an activation or gradient; None where it leaves it."""
            changed = False
            value = value if self.hook_conversion is None else self.hook_conversion.convert(value)
            for point in points:
                result = hook(value, hook=point)
                if result is not None:
                    value, changed = result, True
            if not changed:
                return None
            return value if self.hook_conversion is None else self.hook_conversion.revert(value)

        def forward(module: nn.Module, given: object, output: torch.Tensor) -> object:
            return through(output)

        def backward(module: nn.Module, given: object, gradients: tuple[torch.Tensor, ...]) -> object:
            result = through(gradients[0])
            return result if result is None or isinstance(result, tuple) else (result,)

        run = forward if dir == "fwd" else backward
        run.__name__ = _described(hook)
        register = self.register_forward_hook if dir == "fwd" else self.register_full_backward_hook
        handle = LensHandle(register(run, prepend=prepend), is_permanent, level, hook)
        hooks = self.fwd_hooks if dir == "fwd" else self.bwd_hooks
        hooks.insert(0 if prepend else len(hooks), handle)

    def add_perma_hook(self, hook: HookFunction, dir: str = "fwd") -> None:
        """Adds a hook that ``remove_hooks`` leaves, unless told ``including_permanent=True``.

        Args:
            hook: See ``add_hook``.
            dir: See there.
        """
        self.add_hook(hook, dir, is_permanent=True)

    def hooks_of(self, dir: str) -> list[LensHandle]:
        """The hooks of a direction.

        Args:
            dir: "fwd", "bwd" or "both".

        Raises:
            InputError: For another one.
        """
        if not is_one_of(dir, _DIRECTIONS):
            raise InputError(f"the direction must be 'fwd', 'bwd' or 'both', not {dir!r}.")
        return [*(self.fwd_hooks if dir != "bwd" else []), *(self.bwd_hooks if dir != "fwd" else [])]

    def has_hooks(self, dir: str = "both", including_permanent: bool = True, level: int | None = None) -> bool:
        """True if there is such a hook.

        Args:
            dir: "fwd", "bwd" or "both".
            including_permanent: False leaves permanent hooks out.
            level: Only hooks of this level count.
        """
        return any(
            (including_permanent or not handle.is_permanent) and level in (None, handle.context_level)
            for handle in self.hooks_of(dir)
        )

    def remove_hooks(self, dir: str = "fwd", including_permanent: bool = False, level: int | None = None) -> None:
        """Removes hooks.

        Args:
            dir: "fwd", "bwd" or "both".
            including_permanent: True removes permanent hooks too, and those of every level.
            level: Only hooks of this level go.

        Raises:
            InputError: For another direction.
        """
        gone = [handle for handle in self.hooks_of(dir) if handle.goes(including_permanent, level)]
        for handle in gone:
            handle.hook.remove()
        self.fwd_hooks = [handle for handle in self.fwd_hooks if not any(handle is one for one in gone)]
        self.bwd_hooks = [handle for handle in self.bwd_hooks if not any(handle is one for one in gone)]

    def clear_context(self) -> None:
        """Makes ``ctx`` an empty dictionary."""
        self.ctx = {}

    def enable_reshape(self, hook_conversion: Conversion | None = None) -> None:
        """Lets hooks see activations in another form.

        Args:
            hook_conversion: Has ``convert(value)``, which gives the form that hooks see, and ``revert(value)``, which takes it
                back; None for none.
        """
        self.hook_conversion = hook_conversion

    def layer(self) -> int:
        """The number of the block that the hook point is in.

        Raises:
            ValueError: Outside blocks, and before ``HookedRootModule.setup`` gave it a name.
        """
        if self.name is None:
            raise InputError("this hook point has no name: call setup() at the end of the root module's __init__.")
        return _layer(self.name)

    def __repr__(self) -> str:
        said = [] if self.name is None else [f"name={self.name!r}"]
        counts = (len(self.fwd_hooks), "fwd"), (len(self.bwd_hooks), "bwd")
        return f"HookPoint({', '.join([*said, *(f'{count} {kind}' for count, kind in counts if count)])})"


HookPoint.register(hook_point.HookPoint)


def _layer(name: str) -> int:
    """The number of the block in a hook point's name. Raises InputError, a ValueError, where there is none."""
    layer, _ = split_name(name)
    if layer is None:
        raise InputError(f"{name!r} is not in a block")
    return layer


def _described(function: HookFunction) -> str:
    """How torch names a hook. A partial is not shown with its arguments, which may be large tensors."""
    return f"partial({function.func!r},...)" if isinstance(function, functools.partial) else repr(function)
