"""When arrays that two ways of computing gave count as equal: shape and dtype too."""

from __future__ import annotations

from typing import Any

import numpy as np


def close(found: Any, expected: Any, tolerance: float = 5e-5) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert float(np.abs(found - expected).max(initial=0)) <= tolerance * max(
        1.0, float(np.abs(expected).max(initial=0))
    )
