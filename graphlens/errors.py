"""Every error graphlens raises on purpose, and how it warns. Each says what happened, to which object, what to do."""

from __future__ import annotations

import sys
import warnings


class GraphlensError(Exception):
    """The base of all graphlens errors; the command line prints these without a traceback."""


class UnknownHookPoint(GraphlensError, KeyError):
    """A hook name, alias or names_filter that matches no hook point of this model."""

    def __str__(self) -> str:
        # KeyError would print the repr of the message, quotes and escapes included.
        return str(self.args[0]) if self.args else ""


class InputError(GraphlensError, ValueError):
    """Tokens, prompts or options that the model cannot take: empty, ragged, too long, outside the vocabulary."""


class HookResultError(GraphlensError, ValueError):
    """A Python hook returned something that is not an array of the activation's shape and dtype."""


class ModelFileError(GraphlensError):
    """A model folder that is damaged, incomplete, changed since it was written, or not safe to open."""


class ExportError(GraphlensError):
    """A checkpoint that cannot be exported, or an export that could not be written."""


class VerificationError(ExportError):
    """An exported file that does not behave as the checkpoint does; it is not kept."""


class RuntimeUnavailable(GraphlensError, ImportError):
    """A package, an execution provider or an extra that this call needs is not there or not active."""


# What our code is called through: ``with`` blocks by contextlib, gradients by torch.
_NOT_THE_USERS = ("graphlens", "contextlib", "torch")


def warn(message: str) -> None:
    """Warns with a UserWarning that points at the line of the user's code which led here.

    Args:
        message: What to tell.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
