"""The embedded model, opened once for all tests, so that they find each other's graphs and sessions."""

from __future__ import annotations

import graphlens
from graphlens import HookedTransformer

# A test that changes the model's flags, hooks or edits takes them back. One that counts sessions opens a model of its own.
MODEL = HookedTransformer.from_onnx(graphlens.embedded_model(), "cpu")
MODEL.runner.engine.max_sessions = 48
