"""What a run gave, and what was active when it ran."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from graphlens.analysis.arrays import Array
from graphlens.edits.kinds import Intervention
from graphlens.model.hook_calls import HookFunction


@dataclass(frozen=True)
class Ran:
    """What a run gave, as arrays.

    Attributes:
        output: Logits [b, p, V], or the residual stream [b, p, d_model] where the run stops early; None if it was not
            asked for.
        values: Activations, and gradients as ``<name>_grad``, by name, after the hooks and interventions there.
        learned: The hooks that returned what requires a gradient (see ``Border.wants_gradient``), as errors name them.
        straight_through: Operators that round -> how many of them the gradients passed as if they did not: see
            ``surgery.straight_through``.
    """

    output: Array | None
    values: dict[str, Array]
    learned: Sequence[str] = ()
    straight_through: Mapping[str, int] = field(default_factory=dict)

    @property
    def logits(self) -> Array:
        """The output of a run that was asked for it."""
        assert self.output is not None, "the run was not asked for its output"
        return self.output


class Handle:
    """Removes one hook, in the manner of torch's RemovableHandle.

    Args:
        remove: Removes the hook that has this handle.
    """

    def __init__(self, remove: Callable[[Handle], None]) -> None:
        self._remove = remove

    def remove(self) -> None:
        """Removes the hook, if it is active in this thread."""
        self._remove(self)


@dataclass(frozen=True)
class ActiveHook:
    """A hook function at a hook point.

    Attributes:
        name: The hook point's name.
        user_hook: The function.
        asked: True if it was added under this very name and not chosen by a function; then it has to fire.
        is_permanent: True if resetting leaves it.
        context_level: The depth of the ``with`` block it belongs to, from 1, or what ``add_hook(level=)`` said.
        dir: "fwd" or "bwd".
        hook: Removes it: ``hook.remove()``.
    """

    name: str
    user_hook: HookFunction
    asked: bool = False
    is_permanent: bool = False
    context_level: int | None = None
    dir: str = "fwd"
    hook: Handle = field(default_factory=lambda: Handle(lambda handle: None), compare=False, repr=False)

    def goes(self, including_permanent: bool, level: int | None, name: str | None, dir: str = "both") -> bool:
        """True if a reset with these arguments removes the hook.

        As in TransformerLens, a reset that includes permanent hooks removes those of every level.
        """
        chosen = including_permanent or (not self.is_permanent and level in (None, self.context_level))
        return chosen and name in (None, self.name) and dir in ("both", self.dir)


@dataclass(frozen=True)
class Snapshot:
    """The hooks and interventions that were active at some time in some thread."""

    hooks: tuple[ActiveHook, ...]
    interventions: tuple[Intervention, ...]
