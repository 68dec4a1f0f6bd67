"""Numbers and labels as people read them, and the packages that draw figures."""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np

from graphlens.errors import RuntimeUnavailable

NOT_COMPUTED = "·"
# What is printed in their place, as wide, where a terminal cannot show them.
PLAIN = str.maketrans(
    {
        **{"…": "~", "→": ">", "␣": "_", NOT_COMPUTED: "."},
        **dict.fromkeys("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "*"),  # rich's spinner
    }
)


def view_package(name: str, what: str, extra: str = "view") -> ModuleType:
    """A package of an extra, [view] where nothing else is said.

    Args:
        name: The module to import.
        what: What needs it, for the message.
        extra: The extra that has it.

    Raises:
        RuntimeUnavailable: Where it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise RuntimeUnavailable(f"{what} needs {package}: pip install 'graphlens-onnx[{extra}]'.") from error


def shown(label: str) -> str:
    """A label on one line, for people: escapes for what cannot be printed, ␣ for spaces at its ends."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in label)
    inner = plain.strip(" ")
    if not inner:
        return "␣" * len(plain)
    before = len(plain) - len(plain.lstrip(" "))
    return "␣" * before + inner + "␣" * (len(plain) - before - len(inner))


def number(value: float) -> str:
    """A value for people, to 4 significant digits; a dot where it is not computed yet."""
    return NOT_COMPUTED if np.isnan(value) else f"{value:.4g}"
