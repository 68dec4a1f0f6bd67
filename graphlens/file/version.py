"""The version of graphlens, which is written into every file that it exports."""

from __future__ import annotations

__version__ = "0.2.0"
