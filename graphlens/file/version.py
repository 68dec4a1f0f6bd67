"""The version of graphlens, which every file that it writes tells."""

from __future__ import annotations

__version__ = "0.1.0"
