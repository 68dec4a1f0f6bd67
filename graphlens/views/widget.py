"""An attention view that talks back, for notebooks: pick a head, read ``widget.selected``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from graphlens.errors import InputError
from graphlens.views.attention_view import attention
from graphlens.views.pages import asset
from graphlens.views.wording import view_package

if TYPE_CHECKING:
    import anywidget


def pick_head(
    cache: Mapping[str, object],
    tokens: object,
    *,
    prompt: int = 0,
    layers: Sequence[int] | slice | None = None,
    heads: Sequence[int] | slice | None = None,
    positions: Sequence[int] | slice | None = None,
) -> anywidget.AnyWidget:
    """Shows attention in a notebook, and knows which head and token are picked: ``w = views.pick_head(cache, tokens)``.

    ``w.selected`` is {"layer": 2, "head": 1, "token": 9}: numbers of the model's layers and heads, and the place among the
    tokens shown. Setting it picks another head; ``w.observe(function, "selected")`` calls a function when it changes.

    Args:
        cache: See ``views.attention``, as for the others.
        tokens: See there.
        prompt: See there.
        layers: See there.
        heads: See there.
        positions: See there.

    Returns:
        The widget, for a cell's last line.

    Raises:
        RuntimeUnavailable: Without anywidget (the extra "notebook").
        InputError: See ``views.attention``; and where ``selected`` is set to a head that is not shown.
    """
    package = view_package("anywidget", "picking heads in a notebook", "notebook")
    traitlets = view_package("traitlets", "picking heads in a notebook", "notebook")
    view = attention(cache, tokens, prompt=prompt, layers=layers, heads=heads, positions=positions)
    shown_layers, shown_heads = view.data["layers"], view.data["numbers"]
    assert isinstance(shown_layers, list)
    assert isinstance(shown_heads, list)

    def checked(proposal: Mapping[str, object]) -> object:
        value = proposal["value"]
        known = isinstance(value, Mapping) and value.get("layer") in shown_layers and value.get("head") in shown_heads
        if not known:
            raise InputError(f"selected={value!r}: it is {{'layer': ..., 'head': ...}} of a head that is shown.")
        return value

    members = {
        "_esm": asset("widget.js"),
        "page": traitlets.Unicode(view.report().html()).tag(sync=True),
        "height": traitlets.Int(view.height + 90).tag(sync=True),
        "selected": traitlets.Dict({"layer": shown_layers[0], "head": shown_heads[0]}).tag(sync=True),
        "checked": traitlets.validate("selected")(lambda self, proposal: checked(proposal)),
    }
    made: anywidget.AnyWidget = type("HeadPicker", (package.AnyWidget,), members)()
    return made
