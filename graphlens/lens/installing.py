"""Puts graphlens in the place of TransformerLens, for scripts that import it by that name."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from graphlens.errors import RuntimeUnavailable
from graphlens.lens.absent import LAYOUT, reason_for, refuse

NAME = "transformer_lens"


def install() -> None:
    """Makes ``import transformer_lens`` give graphlens, in this process: a script of TransformerLens's needs no other change.

    Every module of ``graphlens.transformer_lens`` is then found by TransformerLens's name for it too, as the same object.
    Calling it again changes nothing. An installed TransformerLens stays as it is, and is not imported.

    Raises:
        RuntimeUnavailable: TransformerLens itself is imported already: classes of both would mix.
    """
    package = importlib.import_module(LAYOUT)
    there = sys.modules.get(NAME)
    if there is not None and there is not package:
        raise RuntimeUnavailable(
            f"transformer_lens is imported already, from {getattr(there, '__file__', None)}, and objects of both would mix. "
            "Call graphlens.transformer_lens.install() before anything imports it: at the top of the script, or of a notebook "
            "whose kernel was started anew."
        )
    for module in every_module(package):
        sys.modules[NAME + module.__name__.removeprefix(LAYOUT)] = module
    if not any(isinstance(finder, _NothingElse) for finder in sys.meta_path):
        sys.meta_path.insert(0, _NothingElse())


def every_module(package: ModuleType) -> list[ModuleType]:
    """A package and all modules in it, imported.

    Args:
        package: The package.
    """
    found = [package]
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        found += every_module(module) if info.ispkg else [module]
    return found


class _NothingElse:
    """Finds no module below ``transformer_lens`` but those that were put there: others would be second copies of ours."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Refuses what TransformerLens has and graphlens has not; see importlib."""
        if not name.startswith(f"{NAME}."):
            return None
        below = name.removeprefix(f"{NAME}.")
        reason = reason_for(below)
        if reason is not None:
            refuse(below, reason)
        raise ModuleNotFoundError(f"No module named {name!r}: graphlens stands in for transformer_lens here", name=name)
