"""What every part of a model object stands on: its engine, and how arrays cross the border to the user and back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens.engine.engine import Engine
from graphlens.engine.plan import Plan

Array = npt.NDArray[Any]


class NumpyFace:
    """Arrays in and out as they are; graphlens.torch overrides both conversions."""

    _engine: Engine
    _flags: set[str]

    def _plan(self) -> Plan:
        """The plan of a whole run with the flags that are set."""
        return Plan(tuple(sorted(self._flags)))

    @property
    def border(self) -> Any:
        """How arrays cross to the user and back."""
        return SimpleNamespace(to_user=self._to_user, from_user=self._from_user)

    def _to_user(self, array: Array) -> Any:
        return array

    def _from_user(self, value: Any) -> Array:
        """The array of what a user handed in. Raises TypeError for anything that is not one."""
        if not isinstance(value, np.ndarray):
            raise TypeError(type(value).__name__)
        return value
