"""Runtime: ONNX Runtime sessions, execution providers, and Python callbacks inside a graph. No onnx, no torch."""

from __future__ import annotations

from graphlens.runtime.callbacks import PythonCalls
from graphlens.runtime.providers import Providers, choose_providers
from graphlens.runtime.sessions import Session, open_session

__all__ = ["Providers", "PythonCalls", "Session", "choose_providers", "open_session"]
