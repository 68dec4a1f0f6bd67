"""The way from ONNX Runtime into Python and back, on which no exception can be lost.

What this module alone knows: how C++ gets from a call of an operator into a ``try`` of ours without a moment in between. An
exception that leaves the operator goes through C++ and aborts the process. Python looks for signals, whose handlers may raise,
at the first step of every function that is called, where no ``try`` of that function has begun. So no function is called:

- onnxruntime-extensions calls an operator as ``operator(op id, inputs, attributes)`` and makes a tuple of what it gets. The
  operator is the class ``Called``: an exception, which holds the three.
- To make a tuple of it, Python asks for its ``__iter__``. That is a property, whose function is ``here``: the ``throw`` of a
  generator that the run has left in this thread, waiting inside a ``try``.
- An exception thrown into a generator goes to the ``except`` that surrounds its ``yield``. Python does not look for signals
  there. It does when a generator is resumed in any other way.

All of that is C. In the generator, an answer is there before the first step at which Python looks for signals, and what is raised
at any of them is caught and leads to that answer; ``tests/core/test_entry.py`` reads it in the bytecode.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Protocol

from graphlens.runtime.types import Array

# What an operator's call gives: its id, then a shape and values for each output.
Answer = Sequence[int | Sequence[int] | Sequence[float] | Array]
Operator = Callable[[int, list[Array], Mapping[str, str]], Answer]
_Iter = Callable[[], Iterator[object]]
ours: set[int] = set()  # ids of graphlens's operators
theirs: Operator | None = None  # calls everybody else's
reinstall: Callable[[], object] | None = None  # has ``Called`` called again, once that has ended


class Stoppable(Protocol):
    """What stops a run: ``onnxruntime.RunOptions``."""

    terminate: bool


class Calls(Protocol):
    """Whose functions a run calls.

    Attributes:
        error: What one of them raised.
        options: Stops the run.
    """

    error: BaseException | None
    options: Stoppable

    def call(self, activation: Array, run: Array, attributes: Mapping[str, str]) -> Array:
        """Calls a function with an activation, and gives the one to go on with: a plain array, in one piece.

        Args:
            activation: The first input of the operator.
            run: The second.
            attributes: The operator's attributes.
        """

    def interrupt(self) -> None:
        """Stops the run. May be called from any thread."""


def elsewhere(called: BaseException) -> _Iter:
    """Answers calls where no run of ours waits for one: of other people's operators, and of ours once their run has failed.

    Args:
        called: The call.
    """
    op, inputs, attributes = called.args
    answer = (op, inputs[0].shape, inputs[0]) if op in ours or theirs is None else tuple(theirs(op, inputs, attributes))
    return answer.__iter__


class Turn:
    """Whose calls a thread answers.

    Args:
        calls: The run's; None where the thread makes no run.

    Attributes:
        throw: Takes a call and gives the ``__iter__`` of its answer.
    """

    __slots__ = ("calls", "throw")

    def __init__(self, calls: Calls | None = None) -> None:
        self.throw: Callable[[BaseException], object] = elsewhere
        self.calls = calls


class Here(threading.local):
    """Where a thread's calls go. It is called through ``turn.throw``.

    Attributes:
        turn: That of the run that the thread is making, the innermost where a hook runs a model itself.
    """

    __call__ = property(operator.attrgetter("turn.throw"))
    turn = Turn()


here = Here()


class Called(BaseException):
    """One call of an operator: ``args`` are its id, its inputs and its attributes. Never raised but into a generator."""

    __iter__ = property(here)


def answers(calls: Calls, turn: Turn) -> Generator[object, BaseException, None]:
    """Answers the calls that are thrown into it. What the functions raise is kept, and stops the run, as does what a signal
    handler raises here.

    Args:
        calls: The functions.
        turn: Whose ``throw`` is that of this generator, but while a function is called.

    Yields:
        The ``__iter__`` of each answer.
    """
    try:
        answer: object = None  # what the jump back raises is told by this line's ``try``: it comes just before the loop
        while True:
            try:
                yield answer
            except Called as called:
                op, inputs, attributes = called.args
                activation, run = inputs
                # In this clause: Python 3.12 looks for signals where it is left.
                answer = (op, activation.shape, activation).__iter__
            throw, turn.throw = turn.throw, elsewhere
            try:
                result = calls.call(activation, run, attributes)
                answer = (op, result.shape, result).__iter__().__iter__  # an iterator lets go of what it has given
                del result
            except BaseException as error:
                if calls.error is None:
                    calls.error = error
                calls.options.terminate = True
            turn.throw = throw
            del inputs, activation  # or they would be kept until the next call
    except GeneratorExit:
        return
    except BaseException as error:
        turn.throw = elsewhere
        if calls.error is None:
            calls.error = error
        calls.options.terminate = True
        yield answer
