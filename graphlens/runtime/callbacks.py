"""Python inside a running graph: an operator that hands an activation to Python and goes on with what it returns.

An exception that leaves such an operator aborts the whole process, so nothing may: it is kept, the run is stopped, and
it is raised after the run. What a signal handler raises cannot be kept everywhere: see ``runtime/shielded.py``.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib.machinery
import importlib.util
import itertools
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TypeVar

import numpy as np

from graphlens.errors import GraphlensError, RunError, RuntimeUnavailable
from graphlens.runtime.shielded import raise_as_it_is, raise_in, shielded
from graphlens.runtime.types import Array

Callback = Callable[[Array], Array]  # activation -> the activation to go on with

# What an operator's call gives: its id, then a shape and values for each output.
_Answer = tuple[int | Sequence[int] | Sequence[float] | Array, ...]
_Dispatch = Callable[[int, list[Array], Mapping[str, str]], _Answer]
Result = TypeVar("Result")
_PACKAGE = "onnxruntime_extensions"
_OPS = {"GraphlensHookFloat": "dt_float", "GraphlensHookDouble": "dt_double", "GraphlensHookInt64": "dt_int64"}
_active: dict[int, PythonCalls] = {}
_run_ids = itertools.count(1)
library: str | None = None
_reinstall: Callable[[], object] | None = None
# The package keeps its operators in one array that moves as it grows, and open sessions point into it: an operator that
# somebody registers later would crash them. Reserved places make the array large before the first session of ours. (A
# session with Python operators that was opened *before* our first hook cannot be saved from our side.)
_RESERVED = 256
_placeholders: list[object] = []  # nothing but kept alive
_lock = threading.Lock()


class Enough(RunError):
    """Raised by a callback that ends its run: nothing more of it is wanted, so nothing more is computed or copied."""


def _python_operators() -> ModuleType:
    """onnxruntime-extensions' module for Python operators, without its package's ``__init__``.

    That ``__init__`` imports torch and transformers when they are installed, seconds for nothing we use (ADR 3). The
    modules are entered under their own names, so a later ``import onnxruntime_extensions`` finds and shares them.
    """
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise RuntimeUnavailable(
            "Python hooks need onnxruntime-extensions. Install it with: pip install 'graphlens-onnx[cpu]' "
            "(or [gpu]). Reading activations works without it."
        )
    if _PACKAGE not in sys.modules:
        for name in ("_extensions_pydll", "_ocos"):
            full = f"{_PACKAGE}.{name}"
            if full in sys.modules:
                continue
            spec = importlib.machinery.PathFinder.find_spec(full, package.submodule_search_locations)
            if spec is None or spec.loader is None:
                break  # laid out differently than known: the plain import below decides
            sys.modules[full] = module = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[full]
                raise
    return sys.modules.get(f"{_PACKAGE}._ocos") or importlib.import_module(f"{_PACKAGE}._ocos")


def callback_library() -> str:
    """The library that a session needs in order to call Python. The first call registers graphlens's operators.

    Returns:
        The library's path.

    Raises:
        RuntimeUnavailable: onnxruntime-extensions is not installed.
    """
    global library
    with _lock:
        if library is not None:
            return library
        ocos = _python_operators()
        definition = ocos.PyCustomOpDef
        one = [definition.dt_float]
        _placeholders.extend(
            ocos.Opdef.create(_unused, op_type=f"GraphlensReserved{index}", inputs=one, outputs=one)
            for index in range(_RESERVED)
        )
        ours = set()
        for op_type, dtype in _OPS.items():
            op = ocos.Opdef.create(
                _call,
                op_type=op_type,
                inputs=[getattr(definition, dtype), definition.dt_int64],
                outputs=[getattr(definition, dtype)],
                attrs={"index": definition.dt_int64},
            )
            ours.add(op._nativedef.obj_id)
        theirs: _Dispatch = ocos._on_pyop_invocation

        def dispatch(op_id: int, feed: list[Array], attributes: Mapping[str, str]) -> _Answer:
            # The stock dispatcher turns every result into a Python list, which is slow for a large activation (ADR 3);
            # operators that are not ours still go through it.
            if op_id not in ours:
                return theirs(op_id, feed, attributes)
            activation, run = feed
            result = _call(activation, run, int(attributes["index"]))
            return op_id, result.shape, result

        # The package lets go of it when the process ends, without Python's lock if it was loaded or called that late: this
        # reference keeps it from being freed then.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(dispatch))
        install = functools.partial(definition.install_hooker, dispatch)
        install()
        atexit.register(_at_exit, install)
        library = ocos.get_library_path()
        return library


def _at_exit(install: Callable[[], object]) -> None:
    """At the end of the interpreter the package takes the dispatcher away, before functions that were registered earlier
    with ``atexit`` make their runs: from now on each run puts it back."""
    global _reinstall
    _reinstall = install


def _unused(x: Array) -> Array:
    """The operator behind a reserved place; nothing calls it."""
    return x


def _call(activation: Array, run: Array, index: int) -> Array:
    """Hands an activation to the run that it belongs to."""
    calls = _active.get(run.item())
    return activation if calls is None else calls.invoke(index, activation)


class _Here(threading.local):
    """What a thread is doing.

    Attributes:
        calls: The run whose callback it is in, the innermost where a callback runs a model itself.
    """

    calls: PythonCalls | None = None


_here = _Here()


class PythonCalls:
    """The callbacks of one run.

    Args:
        callbacks: Functions by the place of their hook point in the graph's hook map.
    """

    def __init__(self, callbacks: Mapping[int, Callback]) -> None:
        self._callbacks = callbacks
        self._id = next(_run_ids)
        self._error: BaseException | None = None
        self._stop: Callable[[], None] | None = None
        self._inner: PythonCalls | None = None  # the run that a callback of this one is making
        # An exception is thrown into this thread while it is in a callback, and never outside: nothing would catch it.
        self._open_to: int | None = None
        self._gate = threading.Lock()  # held to read and change it
        self._thrown = self._came_out = False

    @property
    def run_id(self) -> Array:
        """The int64 scalar to feed, which leads the graph's calls back to this object."""
        return np.asarray(self._id, np.int64)

    def on_start(self, stop: Callable[[], None]) -> None:
        """Takes the function that stops the run early. ``Session.run_on_device`` calls this when the run begins.

        Args:
            stop: The function. It may be called from a callback and from any thread.
        """
        self._stop = stop
        if self._error is not None:  # a Ctrl-C that came before
            stop()

    def run(self, work: Callable[[], Result]) -> Result:
        """Makes the run.

        Args:
            work: Runs the session, feeding it ``run_id``.

        Returns:
            What ``work`` gave.

        Raises:
            BaseException: What a callback or a signal handler raised, else what ``work`` raises.
        """
        if _reinstall is not None:
            _reinstall()
        _active[self._id] = self
        try:
            around = _here.calls
            if around is None:
                return shielded(lambda: self._made(work), self)
            return self._made_inside(around, work)
        finally:
            _active.pop(self._id, None)

    def _made_inside(self, around: PythonCalls, work: Callable[[], Result]) -> Result:
        """Makes a run that a callback of another run makes, which means: in a thread where no signal handler runs.

        Who ends the run around ends this one. Nothing is thrown into this thread while it is inside ONNX Runtime again.
        """
        around._inner = self
        try:
            if around._error is not None:
                self.interrupt(around._error)
            around._close()
            return self._made(work)
        finally:
            around._inner = None
            around._open_to = threading.get_ident()

    def _made(self, work: Callable[[], Result]) -> Result:
        """Makes the run. What a callback raised comes in place of the run's own error, which only says it was stopped."""
        try:
            result = work()
        except GraphlensError:
            if self._error is None:
                raise
        if self._error is None:
            return result
        kept, self._error = self._error, None
        try:
            raise_as_it_is(kept)
        finally:
            del kept

    def invoke(self, index: int, activation: Array) -> Array:
        """Calls one callback. An error is kept for the end of the run, which goes on unchanged until it is stopped.

        Args:
            index: The place of the callback's hook point in the graph's hook map.
            activation: What the callback is given.

        Returns:
            The activation to go on with.
        """
        if self._error is not None:
            return activation
        outer, result = _here.calls, activation
        try:
            try:
                _here.calls = self
                self._open_to = threading.get_ident()
                result = np.asarray(self._callbacks[index](activation), order="C")
            finally:
                self._close()
        except BaseException as error:  # the callback's, or one that was thrown in, which may come as late as in _close
            self._close()
            self._fail(error)
            result = activation[:0] if isinstance(error, Enough) else activation
        _here.calls = outer
        return result

    def _close(self) -> None:
        """From here on nothing is thrown into this thread. What was thrown comes out here at the latest."""
        with self._gate:
            self._open_to = None
        while self._thrown and not self._came_out:
            time.sleep(0)

    def _fail(self, error: BaseException) -> None:
        """Keeps the first error, and stops the run."""
        self._error = self._error or error
        if self._stop is not None:
            self._stop()

    def interrupt(self, error: BaseException) -> None:
        """Ends the run: no callback is called any more. May be called from another thread.

        Args:
            error: What a signal handler raised.
        """
        self._fail(error)
        inner = self._inner
        if inner is not None:
            inner.interrupt(error)

    def insist(self, error: BaseException) -> None:
        """Raises a KeyboardInterrupt, once, inside the callback that keeps the run from ending.

        Args:
            error: What a signal handler raised.
        """
        inner = self._inner
        if inner is not None:
            inner.insist(error)
            return
        with self._gate:
            if self._open_to is not None and not self._thrown:
                self._thrown = True
                raise_in(self._open_to, self._telling())

    def _telling(self) -> type[BaseException]:
        """A KeyboardInterrupt that tells this object when it comes out: the class is all that can be thrown."""

        def came_out(_: object) -> None:
            self._came_out = True

        return type("KeyboardInterrupt", (KeyboardInterrupt,), {"__init__": came_out})
