"""Python inside a running graph: an operator that hands an activation to Python and goes on with what it returns.

An exception that leaves such an operator aborts the whole process, so nothing may: it is kept, the run is stopped, and
it is raised after the run. What a signal handler raises is no exception to that: see ``runtime/entry.py``.
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
from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import NoReturn, TypeVar

import numpy as np

from graphlens.errors import GraphlensError, RunError, RuntimeUnavailable
from graphlens.runtime import ctrl_c, entry
from graphlens.runtime.entry import Called, Stoppable, here
from graphlens.runtime.first_call import make_first_call
from graphlens.runtime.tracing import Tracing, switched_off
from graphlens.runtime.types import Array

Callback = Callable[[Array], Array]  # activation -> the activation to go on with
Result = TypeVar("Result")
_PACKAGE = "onnxruntime_extensions"
_OPS = {"GraphlensHookFloat": "dt_float", "GraphlensHookDouble": "dt_double", "GraphlensHookInt64": "dt_int64"}
_run_ids = itertools.count(1)
library: str | None = None
_reinstall: Callable[[], object] | None = None
# The package keeps its operators in one array that moves as it grows, and open sessions point into it: an operator that
# somebody registers later would crash them. Reserved places make the array large before the first session of ours. (A
# session with Python operators that was opened *before* our first hook cannot be saved from our side.)
_RESERVED = 256
_placeholders: list[object] = []  # nothing but kept alive
_lock = threading.Lock()
_ROOM = 16  # more than the calls, in Python and in C, that lead from a run to where a callback's errors are caught


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
        if library is None:
            library = _beside(_registered)
        return library


def _beside(work: Callable[[], Result]) -> Result:
    """Does some work in a thread of its own, where no signal handler interrupts it. Who waits for it can be interrupted."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def do() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=do, name="graphlens-first-call", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # at its very end the interpreter starts no more threads
        do()
    else:
        thread.join()
    if errors:
        raise_as_it_is(errors.pop())
    return results[0]


@functools.cache
def _registered() -> str:
    """Registers graphlens's operators and gives the library's path."""
    ocos = _python_operators()
    definition = ocos.PyCustomOpDef
    one = [definition.dt_float]
    _placeholders.extend(
        ocos.Opdef.create(_unused, op_type=f"GraphlensReserved{index}", inputs=one, outputs=one)
        for index in range(_RESERVED)
    )
    for op_type, dtype in _OPS.items():
        op = ocos.Opdef.create(
            _unused,
            op_type=op_type,
            inputs=[getattr(definition, dtype), definition.dt_int64],
            outputs=[getattr(definition, dtype)],
            attrs={"index": definition.dt_int64},
        )
        entry.ours.add(op._nativedef.obj_id)
    entry.theirs = ocos._on_pyop_invocation
    # The package lets go of it when the process ends, without Python's lock if it was loaded or called that late: this
    # reference keeps it from being freed then.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(Called))
    install = functools.partial(definition.install_hooker, Called)
    install()
    atexit.register(_at_exit, install)
    found = str(ocos.get_library_path())
    make_first_call(found)
    return found


def _at_exit(install: Callable[[], object]) -> None:
    """At the end of the interpreter the package takes the operators' function away, before functions that were registered
    earlier with ``atexit`` make their runs: from now on each run puts it back."""
    global _reinstall
    _reinstall = install


def _unused(x: Array) -> Array:
    """The operator that is registered; ``Called`` is called in its place."""
    return x


def raise_as_it_is(error: BaseException) -> NoReturn:
    """Raises an error again, and leaves what it says of its cause.

    Args:
        error: The error.
    """
    cause, context, suppressed = error.__cause__, error.__context__, error.__suppress_context__
    try:
        raise error
    finally:
        if context is not None:
            error.__cause__, error.__context__ = cause, context
            error.__suppress_context__ = suppressed
        del error, cause, context


def _ensure_room(levels: int) -> None:
    """Raises RecursionError if so many calls cannot follow. In a call from C++ it could not be raised."""
    if levels:
        _ensure_room(levels - 1)


class PythonCalls:
    """The callbacks of one run.

    Args:
        callbacks: Functions by the place of their hook point in the graph's hook map.

    Attributes:
        error: What a callback raised.
        options: Stops the run.
    """

    def __init__(self, callbacks: Mapping[int, Callback]) -> None:
        self._callbacks = callbacks
        self._id = next(_run_ids)
        self._tracing: Tracing | None = None
        self._interrupted = False
        self.error: BaseException | None = None
        self.options: Stoppable = SimpleNamespace(terminate=False)  # before the run has begun

    @property
    def run_id(self) -> Array:
        """The int64 scalar to feed. The graph's calls hand it on."""
        return np.asarray(self._id, np.int64)

    def on_start(self, options: Stoppable) -> None:
        """Takes what stops the run early. ``Session.run_on_device`` calls this when the run begins.

        Args:
            options: The run's options.
        """
        self.options = options
        if self.error is not None or self._interrupted:
            options.terminate = True

    def run(self, work: Callable[[], Result]) -> Result:
        """Makes the run, in this thread.

        Args:
            work: Runs the session, feeding it ``run_id``.

        Returns:
            What ``work`` gave.

        Raises:
            BaseException: What a callback or a signal handler raised, else what ``work`` raises.
        """
        if _reinstall is not None:
            _reinstall()
        _ensure_room(_ROOM)
        answers, watched = entry.answers(self), False
        next(answers)
        throw, around = here.throw, here.calls
        here.throw, here.calls = answers.throw, self
        try:
            self._tracing = switched_off()
            watched = ctrl_c.begin(self, around)
            result = work()
        except GraphlensError:
            if self.error is None and not self._interrupted:
                raise
        except BaseException as error:  # a signal handler's, after ONNX Runtime said that the run was stopped
            if self.error is not None or self._interrupted:
                error.__context__ = self.error
            raise
        else:
            if self.error is None:
                return result
        finally:
            here.throw, here.calls = throw, around
            if watched:
                ctrl_c.end(around)
            if self._tracing is not None:
                self._tracing.on()
        if self.error is None:
            raise KeyboardInterrupt  # a hook has caught the one that Python raised in it
        kept, self.error = self.error, None
        try:
            raise_as_it_is(kept)
        finally:
            del kept

    def call(self, activation: Array, run: Array, attributes: Mapping[str, str]) -> Array:
        """Calls one callback, where it may raise.

        Args:
            activation: What the callback is given.
            run: The number of the run that called.
            attributes: "index" is the place of the callback's hook point in the graph's hook map.

        Returns:
            The activation to go on with: the one given once a callback has raised.

        Raises:
            BaseException: What the callback raises.
        """
        if self.error is not None:
            return activation
        if run.item() != self._id:
            raise RunError(
                "a run with Python hooks was called back in the middle of another of the same thread (in greenlets, say): make "
                "one after the other, or each in a thread of its own."
            )
        if self._tracing is not None:
            self._tracing.on()
        try:
            return np.asarray(self._callbacks[int(attributes["index"])](activation), order="C")
        finally:
            self._tracing = switched_off()

    def interrupt(self) -> None:
        """Stops the run: Python is about to raise KeyboardInterrupt. May be called from any thread."""
        self._interrupted = True
        self.options.terminate = True
