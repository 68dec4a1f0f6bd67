"""The operators of onnxruntime-extensions through which a graph calls Python: loaded and registered once.

What this module alone knows: how that package is laid out, and what its first use needs. They lead to ``runtime/entry.py``.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib.machinery
import importlib.util
import sys
import threading
from types import ModuleType

from graphlens.errors import RuntimeUnavailable
from graphlens.runtime import entry
from graphlens.runtime.entry import Called
from graphlens.runtime.first_call import make_first_call
from graphlens.runtime.types import Array

_PACKAGE = "onnxruntime_extensions"
_OPS = {"GraphlensHookFloat": "dt_float", "GraphlensHookDouble": "dt_double", "GraphlensHookInt64": "dt_int64"}
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
    errors: list[BaseException] = []

    def register() -> None:
        global library
        try:
            with _lock:
                library = library or _registered()
        except BaseException as error:
            errors.append(error)

    if library is None:
        # In a thread of its own no signal handler interrupts it. Who waits for it can be interrupted, and may come back later.
        thread = threading.Thread(target=register, name="graphlens-first-call", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # at its very end the interpreter starts no more threads
            register()
        else:
            thread.join()
    if errors:
        raise errors[0]
    assert library is not None
    return library


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
    # At the end of the interpreter the package takes the operators' function away, before functions that were registered earlier
    # with ``atexit`` make their runs: from then on each run puts it back.
    atexit.register(setattr, entry, "reinstall", install)
    found = str(ocos.get_library_path())
    make_first_call(found)
    return found


def _unused(x: Array) -> Array:
    """The operator that is registered; ``Called`` is called in its place."""
    return x
