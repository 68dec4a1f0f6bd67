"""Surgery: pure functions from hooked graph to hooked graph, on onnx-ir. No ONNX Runtime, no torch."""

from __future__ import annotations

from graphlens.file.io_names import gradient_output
from graphlens.surgery.bake import bake
from graphlens.surgery.cut import cut
from graphlens.surgery.differentiate import differentiate, straight_through
from graphlens.surgery.files import check, load, load_plain, names_graphlens, save, seal
from graphlens.surgery.fingerprint import fingerprint
from graphlens.surgery.flagged import with_flagged
from graphlens.surgery.foreign import load_foreign
from graphlens.surgery.gates import gate_input, with_gates, without_gates
from graphlens.surgery.graph import NotHooked, ensure_hooks_resolve, read_manifest
from graphlens.surgery.graphsurgeon import from_graphsurgeon, to_graphsurgeon
from graphlens.surgery.lone_part import part_alone
from graphlens.surgery.outputs import expose, keep_results, prune, strip, without_logits
from graphlens.surgery.process import process_weights
from graphlens.surgery.python_gates import with_python_gates
from graphlens.surgery.segments import first_layers, segment, with_past
from graphlens.surgery.splice import splice
from graphlens.surgery.unfuse.expand import unfuse
from graphlens.surgery.untrusted import CheckReport, check_graph

__all__ = [
    "CheckReport",
    "NotHooked",
    "bake",
    "check",
    "check_graph",
    "cut",
    "differentiate",
    "ensure_hooks_resolve",
    "expose",
    "fingerprint",
    "first_layers",
    "from_graphsurgeon",
    "gate_input",
    "gradient_output",
    "keep_results",
    "load",
    "load_foreign",
    "load_plain",
    "names_graphlens",
    "part_alone",
    "process_weights",
    "prune",
    "read_manifest",
    "save",
    "seal",
    "segment",
    "splice",
    "straight_through",
    "strip",
    "to_graphsurgeon",
    "unfuse",
    "with_flagged",
    "with_gates",
    "with_past",
    "with_python_gates",
    "without_gates",
    "without_logits",
]
