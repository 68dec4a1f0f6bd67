"""An extension of griffe, which reads docstrings for the reference: examples in them become blocks of code."""

from __future__ import annotations

from typing import Any

import griffe

from tools.site.reference import fenced_examples


class Examples(griffe.Extension):  # type: ignore[misc]
    """Makes code of examples that stand in the text."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Is called with each function, class and module."""
        if obj.docstring is not None:
            obj.docstring.value = fenced_examples(obj.docstring.value)
