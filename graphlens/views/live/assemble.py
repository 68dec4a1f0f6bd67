"""Puts the live page together from its parts; it alone knows how data, styles and scripts lie in the HTML."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files

_SCRIPTS = ("edits.js", "engine.js", "model.js", "page.js")  # in an order in which none uses a later one while it loads
_WORKER = ("engine.js", "worker.js")
_IMPORT = re.compile(r'^import \{[^}]*\} from "\./[a-z]+\.js";\n', re.MULTILINE)
_PLACE = re.compile(r"\{\{(\w+)\}\}")
_CHUNK = 6_000_000  # bytes of a packed file in one script element: a multiple of 3, so that base64 adds nothing between
PAGE_FILE, STYLE_FILE, SCRIPT_FILE = "index.html", "page.css", "page.js"


def script() -> str:
    """The page's own script: its modules in one, which imports nothing, and before them the text of its worker."""
    return f"const WORKER = {in_script_text(_joined(_WORKER))};\n{_joined(_SCRIPTS)}"


def _joined(names: Sequence[str]) -> str:
    """Modules in one, which imports nothing."""
    parts = (_IMPORT.sub("", _asset(name)) for name in names)
    return "\n".join(re.sub(r"^export ", "", part, flags=re.MULTILINE) for part in parts)


def style() -> str:
    """The page's style: the look that all pages share, and its own."""
    shared = (files("graphlens.views") / "assets" / "look.css").read_text(encoding="utf-8")
    return f"{shared}\n{_asset('live.css')}"


def runtime_licence() -> str:
    """The licence of ONNX Runtime, whose npm package has no file with it."""
    return _asset("onnxruntime-licence.txt")


def linked_page(settings: Mapping[str, object], title: str, version: str, licences: Mapping[str, str]) -> str:
    """The HTML of a page whose style, script and files lie beside it.

    Args:
        settings: What the page's script is told about the model; JSON.
        title: The page's title, any text.
        version: That of graphlens.
        licences: The name of each package that the page runs on -> the text of its licence.
    """
    values = _values(
        settings,
        title,
        version,
        licences,
        policy="script-src 'self' 'wasm-unsafe-eval'; worker-src blob:; style-src 'self'; connect-src 'self'",
        style=f'<link rel="stylesheet" href="{STYLE_FILE}">',
        script=f'<script type="module" src="{SCRIPT_FILE}"></script>',
    )
    return _filled(_asset(PAGE_FILE), {**values, "files": ""})


def single_page(
    settings: Mapping[str, object],
    title: str,
    version: str,
    licences: Mapping[str, str],
    contents: Mapping[str, Callable[[], bytes]],
) -> Iterator[str]:
    """The HTML of a page that holds everything, in pieces: as large as its files, it is written while it is made.

    Args:
        settings: What the page's script is told about the model; JSON.
        title: The page's title, any text.
        version: That of graphlens.
        licences: The name of each package that the page runs on -> the text of its licence.
        contents: The name of each file that the page's script asks for -> what gives its bytes.

    Yields:
        Text, in order.
    """
    own, look = script(), style()
    values = _values(
        settings,
        title,
        version,
        licences,
        # And nothing is fetched.
        policy=f"script-src {_digest(own)} blob: 'wasm-unsafe-eval'; worker-src blob:; style-src {_digest(look)}",
        style=f"<style>{look}</style>",
        script=f'<script type="module">{own}</script>',
    )
    before, _, after = _asset(PAGE_FILE).partition("{{files}}")
    yield _filled(before, values)
    for name, read in contents.items():
        packed = gzip.compress(read(), 6, mtime=0)
        for start in range(0, len(packed), _CHUNK):
            text = base64.b64encode(packed[start : start + _CHUNK]).decode("ascii")
            yield f'<script type="application/octet-stream" data-file="{html.escape(name)}">{text}</script>\n'
    yield _filled(after, values)


def in_script(data: Mapping[str, object]) -> str:
    """JSON that may stand in a script element: it holds no ``<``, ``>`` or ``&``, whatever the data hold.

    >>> in_script({"a": "</script>"})
    '{"a":"\\\\u003c/script\\\\u003e"}'
    """
    return in_script_text(data)


def in_script_text(data: object) -> str:
    """JSON of anything, a text say, that may stand in a script element: see ``in_script``."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # ASCII: U+2028 and its like are escaped too
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _asset(name: str) -> str:
    return (files("graphlens.views.live") / name).read_text(encoding="utf-8")


def _values(
    settings: Mapping[str, object], title: str, version: str, licences: Mapping[str, str], policy: str, **parts: str
) -> dict[str, str]:
    """What stands in the places of the template."""
    return {
        **parts,
        "policy": f"default-src 'none'; {policy}; img-src data:; base-uri 'none'; form-action 'none'",
        "title": html.escape(title),
        "version": html.escape(version),
        "settings": in_script(settings),
        "licences": "".join(
            f"<h3>{html.escape(name)}</h3><pre>{html.escape(text)}</pre>" for name, text in licences.items()
        ),
    }


def _filled(template: str, values: Mapping[str, str]) -> str:
    """A template with its places filled in one pass: what is put in is not looked into again."""
    return _PLACE.sub(lambda found: values[found[1]], template)


def _digest(text: str) -> str:
    """The digest of an element's content, as a Content-Security-Policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"
