"""What is active: values that belong to one thread or asyncio task, a model's interventions among them."""

from __future__ import annotations

import contextlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, Self, TypeVar, cast

from graphlens.analysis.arrays import Array
from graphlens.edits import gate
from graphlens.edits.gate import Window
from graphlens.edits.kinds import Intervention
from graphlens.edits.parts import PARTS
from graphlens.engine.plan import Plan
from graphlens.errors import InputError
from graphlens.file.names import axis_sizes, select

if TYPE_CHECKING:
    from graphlens.engine.engine import Engine

Edits = Mapping[str, Mapping[str, Array]]  # hook name -> the arrays of its gate, by part
Value = TypeVar("Value")
Result = TypeVar("Result")
_KEPT, _FEW = 500_000, 16  # bytes of one remembered result; how many of them are kept

# One variable for all owners: a context never forgets a variable, so one of each model's own would outlive the model.
_values: ContextVar[Mapping[int, object]] = ContextVar(
    "graphlens", default=MappingProxyType({})
)  # read-only, since all contexts share the default
_owners = itertools.count()


class PerThread(Generic[Value]):
    """A value that each thread and each asyncio task has of its own.

    Two threads that share a model must not see each other's hooks and interventions.

    Args:
        default: The value where none was set.
    """

    def __init__(self, default: Value) -> None:
        self._default = default
        self._key = next(_owners)

    def __reduce__(self) -> tuple[type[Self], tuple[Value]]:
        return type(self), (self._default,)  # a copy has a key of its own, or it would share this one's values

    def get(self) -> Value:
        """The value in this thread."""
        return cast(Value, _values.get().get(self._key, self._default))

    def set(self, value: Value) -> None:
        """Sets the value in this thread.

        Args:
            value: The new value. The default is not stored, so that nothing stays behind when the owner is gone.
        """
        values = {**_values.get(), self._key: value}
        if value == self._default:
            del values[self._key]
        _values.set(values)

    def during(self, value: Value) -> contextlib.AbstractContextManager[None]:
        """Sets the value in this thread for the length of a ``with`` block, then puts back what it was before.

        Args:
            value: The value inside the block.

        Raises:
            InputError: At the end of a block that another thread or task began: what was before is not its own.
        """
        return _During(self, value)


class _During(Generic[Value]):
    """The block of ``PerThread.during``. Every run enters some, and a generator would take several times as long."""

    def __init__(self, owner: PerThread[Value], value: Value) -> None:
        self._owner, self._value = owner, value

    def __enter__(self) -> None:
        self._before = self._owner.get()
        self._owner.set(self._value)
        self._token = _values.set(_values.get())

    def __exit__(self, *error: object) -> None:
        now = _values.get()
        try:
            _values.reset(self._token)
        except ValueError:
            raise InputError(
                "a block of hooks or interventions ended in another thread or asyncio task than it began in: leave it where "
                "it was entered."
            ) from None
        _values.set(now)  # blocks of other owners may have begun or ended inside this one
        self._owner.set(self._before)


@dataclass(frozen=True)
class Active:
    """What is active in a thread beside the plain model.

    Attributes:
        flags: The flags that are set, sorted.
        interventions: The interventions of the ``with`` blocks around, outer ones first.
        hooks: Where forward hooks are, and the functions' names.
    """

    flags: tuple[str, ...]
    interventions: tuple[Intervention, ...]
    hooks: tuple[tuple[str, str], ...]

    @property
    def plain(self) -> bool:
        """True if no hook and no intervention is active, so that runs are the plain model's."""
        return not self.interventions and not self.hooks

    def key(self) -> tuple[object, ...]:
        """All of it in plain values: equal for equal states, so that a digest of it tells sweeps apart."""
        return self.flags, tuple(item.as_key() for item in self.interventions), self.hooks


class ActiveEdits:
    """The interventions that are active on one model in this thread, and what they come to in a run.

    Args:
        engine: The model's engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._items: PerThread[tuple[Intervention, ...]] = PerThread(())
        self._shared: PerThread[tuple[str, ...]] = PerThread(())
        self._resolved: _Remembered[tuple[Intervention, ...]] = _Remembered(lambda found: 0)
        self._composed: _Remembered[tuple[Plan, Edits]] = _Remembered(
            lambda found: sum(array.nbytes for parts in found[1].values() for array in parts.values())
        )

    @property
    def items(self) -> tuple[Intervention, ...]:
        """The active interventions, those of outer blocks first."""
        return self._items.get()

    @contextlib.contextmanager
    def adding(self, items: Sequence[Intervention], plan: Plan, strict: bool) -> Iterator[None]:
        """Adds interventions for the length of the block.

        Args:
            items: The interventions.
            plan: The plan of whole runs, whose hook points there are.
            strict: False ignores positions beyond the sequence.

        Raises:
            UnknownHookPoint: For a hook point that is not there.
            InputError: For what the model lacks, or what cannot fit; before anything runs.
        """
        # Each call of a loop checks its edits; the same ones on the same graph were checked before.
        found = self._resolved.of(items, (strict, plan), lambda: self._resolve(items, plan, strict))
        with self._items.during((*self.items, *found)):
            yield

    def only(self, items: tuple[Intervention, ...]) -> contextlib.AbstractContextManager[None]:
        """Makes these interventions, and no others, active for the length of the block.

        Args:
            items: Interventions that ``adding`` has checked before.
        """
        return self._items.during(items)

    def sharing(self, hooks: Sequence[str]) -> contextlib.AbstractContextManager[None]:
        """Gives runs inside the block a gate that patches at each of these hook points, used or not.

        Runs that each patch another one of them then share one graph and one session.

        Args:
            hooks: The hook points' own names.
        """
        return self._shared.during(tuple(hooks))

    def gates(self, plan: Plan, window: Window) -> tuple[Plan, Edits]:
        """The plan of a run with the gates of the active interventions, and the arrays that they are fed.

        Args:
            plan: The plan without gates.
            window: Where the tokens of the run lie in their sequences.

        Returns:
            (the plan with gates, the arrays of each gate by hook name and part). Without interventions the plan as it is
            and nothing.

        Raises:
            InputError: For an intervention that this run does not pass, or that does not fit it.
        """
        items = self.items
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
            gate.check(some, entries[hook], axis_sizes(config))
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
        edits = {hook: gate.compose(some, entries[hook], sizes, window) for hook, some in by_hook.items()}
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


def _by_hook(items: Iterable[Intervention]) -> dict[str, list[Intervention]]:
    found: dict[str, list[Intervention]] = {}
    for item in items:
        found.setdefault(item.hook, []).append(item)
    return found
