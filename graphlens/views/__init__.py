"""What people see: tables, progress, heat maps, pages and what notebooks show."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphlens.views.attention_view import attention as attention
    from graphlens.views.attribution_view import attribution as attribution
    from graphlens.views.circuit_graph import circuit as circuit
    from graphlens.views.drift_view import drift as drift
    from graphlens.views.feature_view import feature as feature
    from graphlens.views.lens_view import lens as lens
    from graphlens.views.listing import activations as activations
    from graphlens.views.listing import hook_points as hook_points
    from graphlens.views.listing import settings as settings
    from graphlens.views.listing import table as table
    from graphlens.views.maps import bars as bars
    from graphlens.views.maps import heat as heat
    from graphlens.views.pages import Report as Report
    from graphlens.views.pages import View as View
    from graphlens.views.pages import report as report
    from graphlens.views.text_view import text as text
    from graphlens.views.widget import pick_head as pick_head

# Loaded on first use: tables and progress need none of it.
_HOMES = {
    "attention": "attention_view",
    "lens": "lens_view",
    "text": "text_view",
    "attribution": "attribution_view",
    "circuit": "circuit_graph",
    "drift": "drift_view",
    "feature": "feature_view",
    "pick_head": "widget",
    **dict.fromkeys(("heat", "bars"), "maps"),
    **dict.fromkeys(("table", "activations", "hook_points", "settings"), "listing"),
    **dict.fromkeys(("View", "Report", "report"), "pages"),
}


if not TYPE_CHECKING:  # for type checkers a name that is not above is an error

    def __getattr__(name: str) -> object:
        if name in _HOMES:
            return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        raise AttributeError(f"module 'graphlens.views' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_HOMES)
