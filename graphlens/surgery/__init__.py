"""Surgery: pure functions from hooked graph to hooked graph, on onnx-ir. No ONNX Runtime, no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from graphlens.file.io_names import gradient_output
from graphlens.surgery.bake import bake
from graphlens.surgery.cut import cut
from graphlens.surgery.files import check, load, load_plain, names_graphlens, save, seal
from graphlens.surgery.fingerprint import fingerprint
from graphlens.surgery.gates import gate_input, with_gates, without_gates
from graphlens.surgery.graph import NotHooked, ensure_hooks_resolve, read_manifest
from graphlens.surgery.outputs import expose, keep_results, prune, strip, without_logits
from graphlens.surgery.python_gates import with_python_gates
from graphlens.surgery.segments import first_layers, segment, with_past
from graphlens.surgery.splice import splice
from graphlens.surgery.untrusted import CheckReport, check_graph

if TYPE_CHECKING:
    from graphlens.surgery.differentiating import differentiate, straight_through
    from graphlens.surgery.flagged import with_flagged
    from graphlens.surgery.foreign import load_foreign
    from graphlens.surgery.graphsurgeon import from_graphsurgeon, to_graphsurgeon
    from graphlens.surgery.lone_part import part_alone
    from graphlens.surgery.process import process_weights
    from graphlens.surgery.sae_splicing import with_sae, with_saes
    from graphlens.surgery.unfusing.expand import unfuse

# What opening a model needs none of is imported where it is asked for. No module may have the name of one of these functions:
# importing it would put it in the function's place.
_HOMES = {
    "differentiate": "differentiating",
    "from_graphsurgeon": "graphsurgeon",
    "load_foreign": "foreign",
    "part_alone": "lone_part",
    "process_weights": "process",
    "straight_through": "differentiating",
    "to_graphsurgeon": "graphsurgeon",
    "unfuse": "unfusing.expand",
    "with_flagged": "flagged",
    "with_sae": "sae_splicing",
    "with_saes": "sae_splicing",
}

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
    "with_sae",
    "with_saes",
    "without_gates",
    "without_logits",
]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
