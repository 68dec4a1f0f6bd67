"""What ONNX Runtime raises, and what it means for whoever asked for a session or a run."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from graphlens.errors import GraphlensError, ModelFileError, RunError
from graphlens.runtime.providers import onnxruntime
from graphlens.runtime.types import Array, DeviceValue

# ONNX Runtime says so in a text only.
_NO_MEMORY = ("Failed to allocate memory", "bad allocation", "bad_alloc", "out of memory", "Available memory of")


@functools.cache
def ort_errors() -> tuple[type[Exception], ...]:
    """The classes of what ONNX Runtime raises: its own, which share no base class, and Python's that its calls raise."""
    state = onnxruntime().capi.onnxruntime_pybind11_state
    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError, ValueError, MemoryError)


def opening_failed(error: Exception, name: str) -> GraphlensError:
    """The error to raise where ONNX Runtime did not open a session.

    Args:
        error: What it raised.
        name: The model, as the message names it.
    """
    if _is_of_memory(error):
        return RunError(
            f"{name}: there is not enough memory to open it: {error}. Close models that are not needed any more, lower "
            "model.runner.engine.max_sessions, or take a smaller dtype."
        )
    hint = ""
    if type(error).__name__ == "NotImplemented":
        hint = f" ONNX Runtime {onnxruntime().__version__} lacks an operator for it: another version or provider may have it."
    return ModelFileError(f"{name}: ONNX Runtime refuses this model: {error}{hint}")


def run_failed(error: Exception, name: str, feeds: Mapping[str, Array | DeviceValue]) -> RunError:
    """The error to raise where a run failed.

    Args:
        error: What ONNX Runtime raised.
        name: The graph, as the message names it.
        feeds: What it was fed.
    """
    given = ", ".join(f"{name} {list(_shape(value))}" for name, value in feeds.items())
    if _is_of_memory(error):
        return RunError(
            f"{name}: there was not enough memory for a run with {given}: {error}. Run fewer or shorter prompts at once, ask "
            "for fewer activations (names_filter), or close models that are not needed any more."
        )
    return RunError(
        f"{name}: ONNX Runtime could not run it with {given}: {error}. If these shapes are what you meant, the file may be "
        "damaged: `graphlens check FOLDER` looks at it."
    )


def _is_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(text in str(error) for text in _NO_MEMORY)


def _shape(value: Array | DeviceValue) -> tuple[int, ...]:
    shape = getattr(value, "shape", ())  # what is no array has none
    return tuple(shape() if callable(shape) else shape)
