"""Every error graphlens raises on purpose. Each says what happened, to which object, and what to do."""

from __future__ import annotations


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
