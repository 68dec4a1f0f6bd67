"""Surgery: pure functions from hooked graph to hooked graph, on onnx-ir. No ONNX Runtime, no torch."""

from __future__ import annotations

from graphlens.surgery.files import check, load, save
from graphlens.surgery.fingerprint import fingerprint
from graphlens.surgery.hooked_graph import ensure_hooks_resolve, read_manifest
from graphlens.surgery.interop import from_graphsurgeon, to_graphsurgeon
from graphlens.surgery.outputs import expose, prune, strip
from graphlens.surgery.python_gates import with_python_gates
from graphlens.surgery.splice import splice
from graphlens.surgery.strangers import CheckReport, check_graph

__all__ = [
    "CheckReport",
    "check",
    "check_graph",
    "ensure_hooks_resolve",
    "expose",
    "fingerprint",
    "from_graphsurgeon",
    "load",
    "prune",
    "read_manifest",
    "save",
    "splice",
    "strip",
    "to_graphsurgeon",
    "with_python_gates",
]
