"""What is active on a model in a thread: its interventions, and what they come to in a run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

from graphlens.analysis.arrays import Array
from graphlens.edits import gate
from graphlens.edits.gate import Window
from graphlens.edits.kinds import Intervention
from graphlens.edits.parts import PARTS
from graphlens.engine.plan import Plan
from graphlens.errors import InputError, warn
from graphlens.file.names import axis_sizes, select, split_name
from graphlens.model.per_thread import Block, PerThread

if TYPE_CHECKING:
    from graphlens.engine.engine import Engine

Edits = Mapping[str, Mapping[str, Array]]  # firing of a hook point -> the arrays of its gate, by part
Result = TypeVar("Result")
PATTERN = "attn.hook_pattern"
_UNSEEN = (
    "the edit at {} is the same for every key, so it gives queries keys that come after them. With a KV cache a run knows the "
    "keys so far alone: what comes later gets nothing, and the numbers are not those of one run over the whole text. Run without "
    "a cache (use_past_kv_cache=False), or steer attn.hook_attn_scores, whose masked keys stay masked."
)
_KEPT, _FEW = 500_000, 16  # bytes of one remembered result; how many of them are kept


@dataclass(frozen=True)
class Active:
    """What is active in a thread beside the plain model.

    Attributes:
        flags: The flags that are set, sorted.
        interventions: The interventions of the ``with`` blocks around, outer ones first.
        hooks: Where forward hooks are, and the functions' names.
        saes: Where SAEs are, which, and how.
    """

    flags: tuple[str, ...]
    interventions: tuple[Intervention, ...]
    hooks: tuple[tuple[str, str], ...]
    saes: tuple[tuple[object, ...], ...] = ()

    @property
    def plain(self) -> bool:
        """True if no hook and no intervention is active, so that runs are the plain model's."""
        return not self.interventions and not self.hooks

    @property
    def of_file(self) -> bool:
        """True if besides there is no SAE, so that runs are those of the file's own graph."""
        return self.plain and not self.saes

    def key(self) -> tuple[object, ...]:
        """All of it in plain values: equal for equal states, so that a digest of it tells sweeps apart."""
        found = (self.flags, tuple(item.as_key() for item in self.interventions), self.hooks)
        return (*found, self.saes) if self.saes else found


class ActiveEdits:
    """The interventions that are active on one model in this thread, and what they come to in a run.

    Args:
        engine: The model's engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._items: PerThread[tuple[Intervention, ...]] = PerThread(())
        self._shared: PerThread[tuple[str, ...]] = PerThread(())
        self._told: tuple[int, ...] = ()  # the ids of those that a warning was given about
        self._resolved: _Remembered[tuple[Intervention, ...]] = _Remembered(lambda found: 0)
        self._composed: _Remembered[tuple[Plan, Edits]] = _Remembered(
            lambda found: sum(array.nbytes for parts in found[1].values() for array in parts.values())
        )

    def use(self, engine: Engine) -> None:
        """Goes on with another engine over the same file."""
        self._engine = engine

    @property
    def items(self) -> tuple[Intervention, ...]:
        """The active interventions, those of outer blocks first."""
        return self._items.get()

    def adding(self, items: Sequence[Intervention], plan: Plan, strict: bool) -> Block[None]:
        """Adds interventions for the length of a ``with`` block.

        Args:
            items: The interventions.
            plan: The plan of whole runs, whose hook points there are.
            strict: False ignores positions beyond the sequence.

        Raises:
            UnknownHookPoint: At its beginning, for a hook point that is not there.
            InputError: At its beginning, for what the model lacks, or what cannot fit.
        """

        def inside(around: tuple[Intervention, ...]) -> tuple[Intervention, ...]:
            # Each call of a loop checks its edits; the same ones on the same graph were checked before.
            found = self._resolved.of(items, (strict, plan), lambda: self._resolve(items, plan, strict))
            return (*around, *found)

        return Block(self._items, inside)

    def only(self, items: tuple[Intervention, ...]) -> Block[None]:
        """Makes these interventions, and no others, active for the length of the block.

        Args:
            items: Interventions that ``adding`` has checked before.
        """
        return self._items.during(items)

    def sharing(self, hooks: Sequence[str]) -> Block[None]:
        """Gives runs inside the block a gate that patches at each of these hook points, used or not.

        Runs that each patch another one of them then share one graph and one session.

        Args:
            hooks: The hook points' own names.
        """
        return self._shared.during(tuple(hooks))

    def gates(self, plan: Plan, window: Window, elsewhere: bool = False) -> tuple[Plan, Edits]:
        """The plan of a run with the gates of the active interventions, and the arrays that they are fed.

        Args:
            plan: The plan without gates.
            window: Where the tokens of the run lie in their sequences.
            elsewhere: True leaves out interventions at hook points that the run does not pass, instead of refusing it.

        Returns:
            (the plan with gates, the arrays of each gate by firing and part). Without interventions the plan as it is
            and nothing.

        Raises:
            InputError: For an intervention that this run does not pass, or that does not fit it.
        """
        items = self.items
        if items and elsewhere:
            passed = self._engine.passed(plan)
            items = tuple(item for item in items if item.hook in passed)
        if not items:
            return plan, {}
        shared = self._shared.get()
        return self._composed.of(items, (plan, window, shared), lambda: self._compose(items, plan, window, shared))

    def _resolve(self, items: Sequence[Intervention], plan: Plan, strict: bool) -> tuple[Intervention, ...]:
        """The interventions under the hook points' own names, checked against the model."""
        entries, names, config = self._engine.hooks(plan), self._engine.names(plan), self._engine.manifest.config
        resolved = []
        for item in items:
            (name,) = select(names, item.hook, config.n_layers)
            resolved.append(item.at(name, strict))
        for hook, some in _by_hook(resolved).items():
            gate.check(some, gate.firings(hook, entries).values(), axis_sizes(config))
        return tuple(resolved)

    def _compose(
        self, items: Sequence[Intervention], plan: Plan, window: Window, shared: Sequence[str]
    ) -> tuple[Plan, Edits]:
        entries, passed = self._engine.hooks(plan), self._engine.passed(plan)
        sizes, by_hook = axis_sizes(self._engine.manifest.config), _by_hook(items)
        for hook in by_hook:
            if hook not in passed:
                raise InputError(
                    f"the intervention at {hook!r} would change nothing: this run does not pass it. Its flag was switched "
                    "off, or start_at_layer or stop_at_layer leaves it out."
                )
        edits = {
            firing: gate.compose(some, entry, sizes, window)
            for hook, some in by_hook.items()
            for firing, entry in gate.firings(hook, entries).items()
        }
        if plan.past and self._told != tuple(map(id, items)):
            self._told = tuple(map(id, items))
            for firing, arrays in edits.items():
                if _reach_unseen(firing, arrays):
                    warn(_UNSEEN.format(repr(firing)))
        wanted = {hook: gate.kinds(some) for hook, some in by_hook.items()}
        for hook in shared:
            wanted[hook] = tuple(part for part in PARTS if part == "patch" or part in wanted.get(hook, ()))
        return replace(plan, gates=self._engine.gates(wanted, plan)), edits


class _Remembered(Generic[Result]):
    """Keeps the last few results that were made from interventions, since a loop asks for the same again and again.

    Args:
        size: Gives the bytes of a result, not counting the interventions. Large results are not kept.
    """

    def __init__(self, size: Callable[[Result], int]) -> None:
        self._size = size
        self._entries: OrderedDict[Hashable, tuple[Sequence[Intervention], Result]] = OrderedDict()

    def of(self, items: Sequence[Intervention], key: Hashable, make: Callable[[], Result]) -> Result:
        """What ``make`` gave for these very items and an equal key, called if that is not remembered."""
        entry = (tuple(map(id, items)), key)
        found = self._entries.get(entry)
        if found is not None:
            return found[1]
        result = make()
        if sum(item.array.nbytes for item in items) + self._size(result) <= _KEPT:
            self._entries[entry] = (items, result)  # the items too: while they live, no other has their ids
            while len(self._entries) > _FEW:
                self._entries.popitem(last=False)
        return result


def _reach_unseen(firing: str, arrays: Mapping[str, Array]) -> bool:
    """True if the gate at a pattern gives a query keys that come after it, which a KV cache does not have yet."""
    if split_name(firing)[1] != PATTERN:
        return False  # masked scores stay masked
    added, patched = arrays.get("add"), arrays.get("patch")
    # An operand with an entry for each key is of those keys alone.
    if added is not None and added.shape[-1] == 1 and added.any():
        return True
    return patched is not None and patched.shape[-1] == 1 and bool((arrays["where"] & (patched != 0)).any())


def _by_hook(items: Iterable[Intervention]) -> dict[str, list[Intervention]]:
    found: dict[str, list[Intervention]] = {}
    for item in items:
        found.setdefault(item.hook, []).append(item)
    return found
