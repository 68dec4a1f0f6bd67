"""The identity of a static quantiser: what it leaves of an activation is near what it is given."""

from __future__ import annotations

import math

import numpy as np

from graphlens.analysis.arrays import Array
from graphlens.analysis.identity_records import Identity
from graphlens.analysis.identity_terms import Floats
from graphlens.file.names import split_name

ALLOWED = 1e-5  # of a quantiser's range, besides half a step: what float32 is off by


def rounding(
    hook: str, before: Array, integers: Array, scale: Floats, zero_point: Floats, axis: int = 1
) -> Identity | None:
    """What a quantiser makes of an activation = the activation, to half a step of it.

    Entries at either end of the range are left out: whatever lies beyond becomes them.

    Args:
        hook: The hook point whose activation goes through the quantiser.
        before: What QuantizeLinear is given, any shape.
        integers: What it gives, of the same shape.
        scale: Its scale, [] or one for each entry of an axis.
        zero_point: Its zero point, likewise.
        axis: That axis.

    Returns:
        The identity. Its residual is by how much more than half a step both differ, relative to the quantiser's range. None where
        no entry counts, or the integers are of a kind that NumPy lacks.
    """
    if integers.dtype.kind not in "iu":
        return None
    limits = np.iinfo(integers.dtype)
    if scale.ndim:
        along = [-1 if place == axis % before.ndim else 1 for place in range(before.ndim)]
        scale = scale.reshape(along)
        zero_point = zero_point.reshape(along) if zero_point.ndim else zero_point
    counted = (integers > limits.min) & (integers < limits.max) & np.isfinite(before)
    if not counted.any():
        return None
    steps = np.abs(integers - zero_point - before / scale)
    beyond = max(0.0, float(steps[counted].max()) - 0.5) / (limits.max - limits.min)
    layer, name = split_name(hook)
    residual = beyond if math.isfinite(beyond) else math.inf
    return Identity(f"{name} is what its quantiser is given, to half a step", layer, (hook,), residual, ALLOWED, ())
