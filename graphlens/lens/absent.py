"""What TransformerLens has and graphlens has not, each with the reason: for those who import it, and for the documentation."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn

from graphlens.errors import RuntimeUnavailable

LAYOUT = "graphlens.transformer_lens"
FILE = Path(__file__).with_name("reasons.toml")


@functools.cache
def reasons() -> tuple[dict[str, str], dict[str, str]]:
    """What ``reasons.toml`` says.

    Returns:
        (pattern of names below ``transformer_lens`` -> why those are absent, name -> how it differs).
    """
    read = tomllib.loads(FILE.read_text(encoding="utf-8"))
    return {name: group["why"] for group in read["absent"] for name in group["names"]}, read["different"]


def reason_for(name: str) -> str | None:
    """Why a name of TransformerLens's is not here; None where nothing says so.

    Args:
        name: The name below ``transformer_lens``, e.g. ``components.MLP``.
    """
    return next((reason for pattern, reason in reasons()[0].items() if fnmatchcase(name, pattern)), None)


def refuse(name: str, reason: str) -> NoReturn:
    """Says why a name is not here.

    Args:
        name: The name below ``transformer_lens``.
        reason: Why.

    Raises:
        RuntimeUnavailable: Always. It is an ImportError, as an import of what is not there has to be.
    """
    raise RuntimeUnavailable(f"transformer_lens.{name} is not in graphlens: {reason.replace('`', '')}.")


def refusing(module: str) -> Callable[[str], NoReturn]:
    """The ``__getattr__`` of a module of the layout, which is asked for what the module has not.

    Args:
        module: The module's ``__name__``.

    Returns:
        A function of an attribute's name. It raises RuntimeUnavailable with the reason for what TransformerLens has there,
        and AttributeError for anything else.
    """
    path = module.removeprefix(LAYOUT).removeprefix(".")

    def getattr_of_module(name: str) -> NoReturn:
        full = f"{path}.{name}" if path else name
        reason = None if name.startswith("_") else reason_for(full)
        if reason is not None:
            refuse(full, reason)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return getattr_of_module
