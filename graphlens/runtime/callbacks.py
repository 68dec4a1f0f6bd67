"""Python inside a running graph: an operator that hands an activation to Python and goes on with what it returns.

An exception that leaves such an operator aborts the whole process, so nothing may: it is kept, the run is stopped, and
it is raised after the run.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import itertools
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, ModuleType, TracebackType
from typing import Self

import numpy as np

from graphlens.errors import RuntimeUnavailable
from graphlens.runtime.types import Array

Callback = Callable[[Array], Array]  # activation -> the activation to go on with

# What an operator's call gives: its id, then a shape and values for each output.
_Answer = tuple[int | Sequence[int] | Sequence[float] | Array, ...]
_Dispatch = Callable[[int, list[Array], Mapping[str, str]], _Answer]
_Handler = Callable[[int, FrameType | None], object]
_PACKAGE = "onnxruntime_extensions"
_OPS = {"GraphlensHookFloat": "dt_float", "GraphlensHookDouble": "dt_double", "GraphlensHookInt64": "dt_int64"}
_active: dict[int, PythonCalls] = {}
_run_ids = itertools.count(1)
library: str | None = None
# The package keeps its operators in one array that moves as it grows, and open sessions point into it: an operator that
# somebody registers later would crash them. Reserved places make the array large before the first session of ours. (A
# session with Python operators that was opened *before* our first hook cannot be saved from our side.)
_RESERVED = 256
_placeholders: list[object] = []  # nothing but kept alive
_lock = threading.Lock()


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

        definition.install_hooker(dispatch)
        library = ocos.get_library_path()
        return library


def _unused(x: Array) -> Array:
    """The operator behind a reserved place; nothing calls it."""
    return x


def _call(activation: Array, run: Array, index: int) -> Array:
    """Hands an activation to the run that it belongs to."""
    calls = _active.get(run.item())
    return activation if calls is None else calls.invoke(index, activation)


class PythonCalls:
    """The callbacks of one run. Use it as a context manager around the run, and feed ``run_id``.

    Leaving it raises what a callback raised, or the KeyboardInterrupt of a Ctrl-C that came during the run.

    Args:
        callbacks: Functions by the place of their hook point in the graph's hook map.
    """

    def __init__(self, callbacks: Mapping[int, Callback]) -> None:
        self._callbacks = callbacks
        self._id = next(_run_ids)
        self._error: BaseException | None = None
        self._stop: Callable[[], None] | None = None
        self._in_callback = False
        self._usual: _Handler | None = None  # what handles a Ctrl-C before and after the run

    @property
    def run_id(self) -> Array:
        """The int64 scalar to feed, which leads the graph's calls back to this object."""
        return np.asarray(self._id, np.int64)

    def on_start(self, stop: Callable[[], None]) -> None:
        """Takes the function that stops the run early. ``Session.run_on_device`` calls this when the run begins.

        Args:
            stop: The function. It may be called from a callback.
        """
        self._stop = stop
        if self._error is not None:  # a Ctrl-C that came before
            stop()

    def __enter__(self) -> Self:
        _active[self._id] = self
        if threading.current_thread() is threading.main_thread():  # no other is told of a Ctrl-C
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._usual = handler
                signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _active.pop(self._id, None)
        if self._usual is not None:
            now = signal.signal(signal.SIGINT, self._usual)
            if now != self._interrupted:  # a callback has set another
                signal.signal(signal.SIGINT, now)
        kept, self._error = self._error, None
        if kept is None:
            return
        # The run's own error, if any, only says that it was stopped. What the callback said of its error's cause stays.
        cause, context, suppressed = kept.__cause__, kept.__context__, kept.__suppress_context__
        try:
            raise kept
        finally:
            kept.__cause__, kept.__context__ = cause, context
            kept.__suppress_context__ = suppressed

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
        try:
            self._in_callback = True
            result = np.asarray(self._callbacks[index](activation), order="C")
            self._in_callback = False
            return result
        except BaseException as error:
            self._in_callback = False
            self._fail(error)
            return activation

    def _fail(self, error: BaseException) -> None:
        """Keeps the first error, and stops the run."""
        self._error = self._error or error
        if self._stop is not None:
            self._stop()

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        """Handles a Ctrl-C during the run. Python raises it wherever it is next executed, which may be at the beginning of
        an operator's call, where nothing could catch it."""
        assert self._usual is not None
        if self._in_callback:
            self._usual(number, frame)
            return
        try:
            self._usual(number, frame)
        except BaseException as error:
            self._fail(error)
