"""A hook point as an object: where it is, its hooks, and a place to keep things between calls."""

from __future__ import annotations

from operator import methodcaller
from typing import TYPE_CHECKING, Any

from graphlens.errors import InputError
from graphlens.file.names import split_name

if TYPE_CHECKING:
    from graphlens.model.hook_calls import HookFunction
    from graphlens.model.hooks import HookRegistry
    from graphlens.model.ran import ActiveHook

FORWARD, BACKWARD = "fwd", "bwd"


class HookPoint:
    """What a hook function receives as ``hook``: where it is, and a place to keep things between calls.

    Attributes:
        name: The hook point's name.
        ctx: A dictionary for the user's own things, kept until ``clear_context``.
    """

    def __init__(self, name: str, registry: HookRegistry | None = None) -> None:
        self.name = name
        self.ctx: dict[str, Any] = {}
        self._registry = registry

    def layer(self) -> int:
        """The index of the block that this hook point is in.

        Raises:
            ValueError: Outside the blocks.
        """
        layer, _ = split_name(self.name)
        if layer is None:
            raise ValueError(f"{self.name!r} is not in a block")
        return layer

    def __call__(self, x: object) -> object:
        """An activation after the hooks that are active here, as a run has it; the activation itself where there are none.

        Args:
            x: An array or tensor.

        Raises:
            InputError: While an intervention is active here, and for a hook point that belongs to no model.
            HookResultError: For what a hook returned; and whatever a hook raises.
        """
        return self._owner.fire(self.name, x)

    def clear_context(self) -> None:
        """Empties ``ctx``."""
        self.ctx.clear()

    def add_hook(
        self,
        hook: HookFunction,
        dir: str = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Adds a hook at this hook point, until it is reset.

        Args:
            hook: See ``HookedTransformer.add_hook``, as for what follows.
            dir: See there.
            is_permanent: See there.
            level: See there.
            prepend: See there.

        Raises:
            InputError: For another ``dir``, and for a hook point that belongs to no model.
        """
        self._owner.add(self.name, hook, dir, is_permanent, prepend, level)

    def add_perma_hook(self, hook: HookFunction, dir: str = "fwd") -> None:
        """Adds a hook at this hook point that resetting leaves, unless told ``including_permanent=True``.

        Args:
            hook: See ``add_hook``.
            dir: See there.
        """
        self.add_hook(hook, dir, is_permanent=True)

    @property
    def fwd_hooks(self) -> list[ActiveHook]:
        """The hooks active here in this thread, in the order they run. A list of its own: adding to it adds none."""
        return self._owner.active(self.name)

    @property
    def bwd_hooks(self) -> list[ActiveHook]:
        """The backward hooks active here in this thread, as ``fwd_hooks``."""
        return self._owner.active(self.name, BACKWARD)

    def has_hooks(self, dir: str = "both", including_permanent: bool = True, level: int | None = None) -> bool:
        """True if a hook of that kind is active here in this thread.

        Args:
            dir: "fwd", "bwd" or "both".
            including_permanent: False leaves permanent hooks out.
            level: Only hooks of this level count; see HookedTransformer.add_hook.
        """
        active = [*(self.fwd_hooks if dir != BACKWARD else []), *(self.bwd_hooks if dir != FORWARD else [])]
        return any(
            (including_permanent or not hook.is_permanent) and level in (None, hook.context_level) for hook in active
        )

    def remove_hooks(self, dir: str = "fwd", including_permanent: bool = False, level: int | None = None) -> None:
        """Removes the hooks that are active at this hook point.

        Args:
            dir: "fwd", "bwd" or "both".
            including_permanent: True removes permanent hooks too.
            level: Only hooks of this level go; see ``HookedTransformer.add_hook``.
        """
        self._owner.reset(including_permanent, level, self.name, dir)

    def __reduce__(self) -> tuple[object, ...]:
        # That of the model's copy, or one of no model.
        made = (
            (HookPoint, (self.name,))
            if self._registry is None
            else (methodcaller("point", self.name), (self._registry,))
        )
        return *made, {"ctx": self.ctx}

    @property
    def _owner(self) -> HookRegistry:
        if self._registry is None:
            raise InputError(f"the hook point {self.name!r} belongs to no model")
        return self._registry

    def __repr__(self) -> str:
        return f"HookPoint({self.name!r})"
