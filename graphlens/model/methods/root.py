"""The methods of HookedTransformer that TransformerLens's HookedRootModule and torch's Module have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, Self

from graphlens.analysis.arrays import ArrayT
from graphlens.analysis.slices import SliceInput
from graphlens.errors import InputError, RuntimeUnavailable, checked_number
from graphlens.file.names import NamesFilter, select, unknown_hook
from graphlens.model.caching import Pairs, caching_hooks
from graphlens.model.hook_calls import HookFunction
from graphlens.model.hooks import BACKWARD, FORWARD, HookPoint
from graphlens.model.modules import modules_of
from graphlens.model.ran import ActiveHook
from graphlens.model.runner import Runner


class RootMethods(Generic[ArrayT]):
    """The part of HookedTransformer that a module with hook points has, whatever it computes."""

    runner: Runner[ArrayT]

    # Hooks, as HookedRootModule has them

    def remove_all_hook_fns(
        self, direction: str = "both", including_permanent: bool = False, level: int | None = None
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
        self,
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
        self,
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
        self.check_hooks_to_add(hook_point, hook_point_name, hook, dir, is_permanent, prepend)
        hook_point.add_hook(hook, dir, is_permanent, level, prepend)

    def list_hooks(
        self, name_filter: NamesFilter = None, dir: str = "both", including_permanent: bool = True
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

    @property
    def context_level(self) -> int:
        """How many ``with model.hooks`` blocks are open in this thread."""
        return self.runner.hooks.depth

    # Hooks that keep activations

    def get_caching_hooks(
        self,
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
        self._ensure_device(device)
        options = (
            checked_number(incl_bwd, "incl_bwd", bool),
            checked_number(remove_batch_dim, "remove_batch_dim", bool),
        )
        return caching_hooks(self.runner, names_filter, *options, cache, pos_slice)

    def add_caching_hooks(
        self,
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
        cache, forward, backward = self.get_caching_hooks(names_filter, incl_bwd, device, remove_batch_dim, cache)
        for direction, pairs in ((FORWARD, forward), (BACKWARD, backward)):
            for name, hook in pairs:
                self.runner.hooks.add(name, hook, direction)
        return cache

    def cache_all(
        self,
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
        self.add_caching_hooks(None, incl_bwd, device, remove_batch_dim, cache)

    def cache_some(
        self,
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
        self.add_caching_hooks(names, incl_bwd, device, remove_batch_dim, cache)

    def _ensure_device(self, device: object) -> None:
        """Refuses to keep activations on another device than the model's."""
        if device is not None:
            self.to(str(device))

    # What a torch module has

    def named_modules(self, memo: object = None, prefix: str = "") -> Iterator[tuple[str, object]]:
        """The model, its parts and the hook points that there are now, with their names.

        Args:
            memo: Holds torch's place.
            prefix: What the names begin with.

        Yields:
            (name, module). ``blocks`` is a list.
        """
        return modules_of(self, self.runner, "", prefix)

    def modules(self) -> Iterator[object]:
        """The modules of ``named_modules()``."""
        return (module for _, module in self.named_modules())

    def named_children(self) -> Iterator[tuple[str, object]]:
        """The parts and hook points directly in the model, with their names."""
        return ((name, module) for name, module in self.named_modules() if name and "." not in name)

    def children(self) -> Iterator[object]:
        """The modules of ``named_children()``."""
        return (module for _, module in self.named_children())

    @property
    def mod_dict(self) -> dict[str, object]:
        """Every part and every hook point that there is now by its name, the model itself left out."""
        return {name: module for name, module in self.named_modules() if name}

    @property
    def training(self) -> bool:
        """False: there is no dropout, and a graphlens model does not train."""
        return False

    def eval(self) -> Self:
        """The model itself: there is no dropout to turn off."""
        return self

    def train(self, mode: bool = True) -> Self:
        """The model itself, which does not train.

        Args:
            mode: False, as ``eval`` has it.

        Raises:
            InputError: For True.
        """
        if mode:
            raise InputError("a graphlens model does not train: train the checkpoint, then export it again.")
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """The model itself, whose weights have no gradients.

        Args:
            requires_grad: False.

        Raises:
            InputError: For True.
        """
        if requires_grad:
            raise InputError("the weights of a graphlens model have no gradients.")
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing: weights have no gradients.

        Args:
            set_to_none: Torch's; changes nothing.
        """

    def to(self, device_or_dtype: object, print_details: bool = True) -> Self:
        """The model itself, if it already is what is asked for: a session's device and dtype are fixed when it is opened.

        Args:
            device_or_dtype: "cpu", "cuda" or a torch.device; or a dtype, by its name, NumPy's or torch's.
            print_details: TransformerLens's; changes nothing.

        Raises:
            RuntimeUnavailable: For a GPU that the model does not run on.
            InputError: For another dtype or device.
        """
        asked, stated = _named(device_or_dtype), self.runner.engine.dtype
        if asked.startswith(("float", "bfloat", "int", "uint", "complex")):
            if asked != self.runner.config.dtype and not stated.startswith(asked):
                raise InputError(
                    f"this model has {stated}, fixed when it is opened: open it with from_pretrained(..., dtype={asked!r})."
                )
            return self
        kind, first = asked.partition(":")[0], self.runner.engine.providers[0]
        if kind == "cpu" or (kind == "cuda" and first.startswith("CUDA")):
            return self
        if kind == "cuda":
            raise RuntimeUnavailable(
                f"this session runs on {first}, which is fixed when it is opened: open the model with "
                'from_pretrained(..., providers="cuda").'
            )
        raise InputError(f"graphlens does not run on {kind!r}; it has 'cpu' and 'cuda'.")

    def cpu(self) -> Self:
        """``to("cpu")``: the model itself."""
        return self.to("cpu")

    def cuda(self, device: object = None) -> Self:
        """``to("cuda")``.

        Args:
            device: A GPU, by its number or name; None for "cuda".

        Raises:
            RuntimeUnavailable: If the model does not run on it.
        """
        return self.to("cuda" if device is None else f"cuda:{device}" if isinstance(device, int) else device)

    def mps(self) -> Self:
        """``to("mps")``, which graphlens does not run on. Raises InputError."""
        return self.to("mps")

    def half(self) -> Self:
        """``to("float16")``; see ``to``."""
        return self.to("float16")

    def float(self) -> Self:
        """``to("float32")``; see ``to``."""
        return self.to("float32")

    def double(self) -> Self:
        """``to("float64")``; see ``to``."""
        return self.to("float64")

    def bfloat16(self) -> Self:
        """``to("bfloat16")``; see ``to``."""
        return self.to("bfloat16")


def _named(asked: object) -> str:
    """A device or dtype that was asked for, by its name."""
    if isinstance(asked, type):  # NumPy's, and Python's float
        return {"float": "float64"}.get(asked.__name__, asked.__name__)
    text = str(asked).removeprefix("torch.")
    return {"half": "float16", "double": "float64"}.get(text, text)
