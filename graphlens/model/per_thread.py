"""Values that belong to one thread or asyncio task, and ``with`` blocks for them that no interruption leaves open."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Self, TypeVar, cast

from graphlens.errors import InputError

Value = TypeVar("Value")
Given = TypeVar("Given")
Other = TypeVar("Other")
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")
_Leave = Callable[[type[BaseException] | None, BaseException | None, TracebackType | None], None]

# One variable for all owners: a context never forgets a variable, so one of each model's own would outlive the model.
_values: ContextVar[Mapping[int, _Set]] = ContextVar(
    "graphlens", default=MappingProxyType({})
)  # read-only, since all contexts share the default
_owners = itertools.count()


class _Set:
    """A value that was set in a thread.

    Attributes:
        value: The value.
        around: What was set before the block that set this one.
        block: The block.
        leave: Refers to what leaves the block, which nothing but the ``with`` statement holds. None outside blocks, and
            once the block has ended as it should, since tasks that were started inside keep its value.
    """

    __slots__ = ("around", "block", "leave", "value")

    def __init__(
        self,
        value: object,
        around: _Set | None = None,
        block: Block[Any] | None = None,
        leave: weakref.ref[_Leave] | None = None,
    ) -> None:
        self.value, self.around, self.block, self.leave = value, around, block, leave


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
        found = self.now()
        return self._default if found is None else cast(Value, found.value)

    def now(self) -> _Set | None:
        """What is set in this thread. Blocks whose end was interrupted are ended first."""
        found = _values.get().get(self._key)
        while found is not None and found.leave is not None and found.leave() is None:
            if found.block is not None:
                found.block.finish()
            found = found.around
            self.put(found)
        return found

    def put(self, state: _Set | None) -> None:
        """Sets what is set in this thread.

        Args:
            state: What ``now`` gave. None and the default are not stored, so that nothing stays when the owner is gone.
        """
        values = dict(_values.get())
        if state is None or (state.around is None and state.leave is None and state.value == self._default):
            values.pop(self._key, None)
        else:
            values[self._key] = state
        _values.set(values)

    def set(self, value: Value) -> None:
        """Sets the value in this thread, inside a block until its end.

        Args:
            value: The new value.
        """
        now = self.now()
        self.put(_Set(value) if now is None else _Set(value, now.around, now.block, now.leave))

    def during(self, value: Value) -> Block[None]:
        """Sets the value in this thread for the length of a ``with`` block, then puts back what it was before.

        Args:
            value: The value inside the block.

        Raises:
            InputError: At the end of a block that another thread or task began: what was before is not its own.
        """
        return Block(self, lambda around: value)


class _Exit:
    """``Block.__exit__``: what Python holds from the beginning of a ``with`` statement to its end, and calls there.

    It is an object of its own for each statement, and nothing else holds it. A signal handler may raise as soon as it
    is called, before its first line; the ``with`` statement is over then, and nobody is told. But the object is gone.
    """

    def __get__(self, block: Block[Given] | None, owner: type) -> Callable[..., None]:
        # contextlib.ExitStack asks the class, and calls what it gets with the block.
        return Block.leave if block is None else block.exit()


class Block(Generic[Given]):
    """A ``with`` block in which a thread has another value. It may be entered again after its end, and decorate functions.

    A KeyboardInterrupt never leaves it open, wherever it comes.

    Args:
        owner: Whose value it is.
        value: Gives the value inside the block from the one around it, when the block is entered.
        after: What else is to be done at the end, given the value that was set. It may be done twice.
        given: What ``as`` gives.
    """

    def __init__(
        self,
        owner: PerThread[Value],
        value: Callable[[Value], Value],
        after: Callable[[Value], None] | None = None,
        given: Given | None = None,
    ) -> None:
        self._owner: PerThread[Any] = owner
        self._value: Callable[[Any], object] = value
        self._after: Callable[[Any], None] | None = after
        self._given = cast(Given, given)
        self._exit: weakref.ref[_Leave] | None = None
        self._held: _Leave | None = None  # by this object where no ``with`` statement does
        self._set: _Set | None = None
        self._token: Token[Mapping[int, _Set]] | None = None

    if TYPE_CHECKING:

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
        ) -> None: ...

    else:
        __exit__ = _Exit()

    def exit(self) -> _Leave:
        """What leaves the block: the same object as long as somebody holds it."""
        found = None if self._exit is None else self._exit()
        if found is None:
            found = functools.partial(Block.leave, self)
            self._exit = weakref.ref(found)
        return found

    def __enter__(self) -> Given:
        if self._set is not None:
            raise InputError("a block of hooks or interventions was entered twice: make one for each `with`.")
        if self._exit is None or self._exit() is None:  # no ``with`` statement asked for it: an ExitStack, or a call
            self._held = self.exit()
        around = self._owner.now()
        self._set = _Set(self._value(self._owner.get()), around, self, self._exit)
        self._owner.put(self._set)
        self._token = _values.set(_values.get())
        return self._given

    def leave(self, *_: object) -> None:
        """Ends the block.

        Raises:
            InputError: In another thread or task than the one that entered it, and where it is not open.
        """
        state, token = self._set, self._token
        if state is None or token is None:
            raise InputError("a block of hooks or interventions was left that was not entered.")
        self.finish()
        self._set = self._token = self._held = None
        now = _values.get()
        try:
            _values.reset(token)
        except ValueError:
            raise InputError(
                "a block of hooks or interventions ended in another thread or asyncio task than it began in: leave it where "
                "it was entered."
            ) from None
        _values.set(now)  # blocks of other owners may have begun or ended inside this one
        self._owner.put(state.around)
        state.leave = None

    def finish(self) -> None:
        """Does what is to be done at the end besides setting the value."""
        if self._set is not None and self._after is not None:
            self._after(self._set.value)

    def giving(self, given: Other) -> Block[Other]:
        """The same block, entered by nobody yet.

        Args:
            given: What ``as`` gives.
        """
        return Block(self._owner, self._value, self._after, given)

    def __call__(self, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """The function, with every call of it in such a block."""

        @functools.wraps(function)
        def inside(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            with self.giving(None):  # a block of its own for each call
                return function(*args, **kwargs)

        return inside
