"""The hooks of an open model: a registry that knows what runs the model."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

from graphlens.model.hooks import HookRegistry

if TYPE_CHECKING:
    from graphlens.model.runner import Runner


class RunnerHooks(HookRegistry):
    """The hooks of a runner's model. Pickled or copied deeply they are those of the runner's copy, which begins without any.

    Args:
        runner: Runs the model.
    """

    def __init__(self, runner: Runner[Any]) -> None:
        config = runner.config
        super().__init__(runner.names, config.n_layers, config.d_vocab, config.num_experts or 0)
        self._runner = runner

    def fire(self, name: str, value: object) -> object:
        """Calls the hooks that are active at a hook point; see ``HookRegistry.fire``."""
        from graphlens.model.calls import call_hook_point  # which needs what needs this module

        return call_hook_point(self._runner, name, value)

    def __reduce__(self) -> tuple[object, ...]:
        return attrgetter("hooks"), (self._runner,)
