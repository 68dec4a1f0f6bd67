"""What one thread of the process may do at a time: tracing and optimising, whose libraries keep state of their own.

onnxscript's rewrite rules remember what they matched in the rule itself, and silencing torch.onnx redirects standard output.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")
_ALONE = threading.RLock()


def alone(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """The same function, for which a thread waits while another one is in it or in another such function.

    Args:
        function: Any function.
    """

    @functools.wraps(function)
    def waiting(*given: Given.args, **options: Given.kwargs) -> Result:
        with _ALONE:
            return function(*given, **options)

    return waiting
