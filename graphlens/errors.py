"""Every error graphlens raises on purpose, the checks of plain arguments, and how it warns.

Each error says what happened, to which object, and what to do. Each is a GraphlensError, and of the built-in kind that its
meaning has too: code written for TransformerLens catches KeyError, ValueError, TypeError or RuntimeError.
"""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Iterable
from types import FrameType
from typing import Any, overload


class GraphlensError(Exception):
    """The base of all graphlens errors; the command line prints these without a traceback."""


class UnknownHookPoint(GraphlensError, KeyError):
    """A hook name, alias or names_filter that matches no hook point of this model."""

    def __str__(self) -> str:
        # KeyError would print the repr of the message, quotes and escapes included.
        return str(self.args[0]) if self.args else ""


class InputError(GraphlensError, ValueError):
    """Tokens, prompts or options that the model cannot take: empty, ragged, too long, outside the vocabulary."""


class StateDictError(InputError, RuntimeError):
    """A state dict that does not fit a model: names that are missing or are none of its weights, other shapes."""


class InputTypeError(InputError, TypeError):
    """An argument of a kind that the call does not take: a number where a function is wanted, say."""


class InputIndexError(InputError, IndexError):
    """An index outside the axis that it is of, in a slice or an index of a FactoredMatrix, say."""


class InputKeyError(InputError, KeyError):
    """A weight that a model's file does not have."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class InputShapeError(InputError, RuntimeError):
    """Arrays whose shapes do not go together: a ValueError as NumPy's, and a RuntimeError as torch's."""


class InputAttributeError(InputError, AttributeError):
    """An attribute was assigned that cannot be: a weight, or another part of a model."""


class HookResultError(GraphlensError, ValueError):
    """A Python hook returned something that is not an array of the activation's shape and dtype."""


class ModelFileError(GraphlensError, ValueError):
    """A model folder that is damaged, incomplete, changed since it was written, or not safe to open."""


class RunError(GraphlensError, RuntimeError):
    """A graph that ONNX Runtime could not run: not enough memory, or inputs or operators at which it fails."""


class ExportError(GraphlensError, ValueError):
    """A checkpoint that cannot be exported, or an export that could not be written."""


class VerificationError(ExportError, RuntimeError):
    """An exported file that does not behave as the checkpoint does; it is not kept."""


class RuntimeUnavailable(GraphlensError, ImportError):
    """A package, an execution provider or an extra that this call needs is not there or not active."""


# What our code is called through: ``with`` blocks by contextlib, gradients by torch.
_NOT_THE_USERS = ("graphlens", "contextlib", "torch")


def warn(message: str, kind: type[Warning] = UserWarning) -> None:
    """Warns with a warning that points at the line of the user's code which led here.

    Args:
        message: What to tell.
        kind: DeprecationWarning for a name that goes; see CONTRIBUTING.md.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and not _is_users(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, kind, stacklevel=level)


def called() -> tuple[str, tuple[str, ...]]:
    """The function of graphlens that the user's code called, wherever inside it this is asked.

    Returns:
        Its name, and the names of its arguments.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and not _is_users(frame.f_back):
        frame = frame.f_back
    code = frame.f_code
    return code.co_name, code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def _is_users(frame: FrameType) -> bool:
    """True for a frame of the user's own code."""
    return frame.f_globals.get("__name__", "").partition(".")[0] not in _NOT_THE_USERS


def is_one_of(value: object, allowed: Iterable[str | None]) -> bool:
    """True if a value is one of some words, whatever else it may be: an array compares to no single answer.

    Args:
        value: What a user gave.
        allowed: The words; None among them where it is one of the choices.
    """
    return any(value is one or (isinstance(value, str) and value == one) for one in allowed)


@overload
def checked_number(value: object, what: str, kind: type[bool]) -> bool: ...
@overload
def checked_number(
    value: object, what: str, kind: type[int] = int, least: float | None = None, most: float | None = None
) -> int: ...
@overload
def checked_number(
    value: object, what: str, kind: type[float], least: float | None = None, most: float | None = None
) -> float: ...
def checked_number(
    value: Any, what: str, kind: type[Any] = int, least: float | None = None, most: float | None = None
) -> Any:
    """A number that a user gave as an argument, checked.

    Args:
        value: What was given: a Python number, NumPy's, or an array or tensor without axes.
        what: The argument's name, for the error.
        kind: ``int`` takes whole numbers only, not 2.0; ``float`` finite numbers; ``bool`` True and False only.
        least: The least that it may be; None for no limit.
        most: The most.

    Returns:
        The number as Python's own ``kind``.

    Raises:
        InputError: For anything else: text, None, NaN, infinities, a bool in place of a number, and the other way around.
    """
    given = value.item() if getattr(value, "ndim", None) == 0 else value  # NumPy's, and tensors
    found: Any = None
    if isinstance(given, bool) == (kind is bool) and isinstance(given, int | float if kind is float else int):
        with contextlib.suppress(OverflowError):
            found = kind(given)
    below = least is not None and found is not None and found < least
    above = most is not None and found is not None and found > most
    if found is None or (kind is float and not math.isfinite(found)) or below or above:
        wanted = {int: "a whole number", float: "a finite number", bool: "True or False"}[kind]
        if least is not None and most is not None:
            wanted += f" from {least} to {most}"
        elif least is not None or most is not None:
            wanted += f" of {least} or more" if least is not None else f" of {most} or less"
        raise InputError(f"{what}={value!r}: {what} must be {wanted}.")
    return found
