"""Writes the tables of docs/saes.md: ``python -m tools.sae_tables``, or ``--check`` to be told that they are stale.

They are made of the register of layouts, and of the weights that each architecture has.
"""

from __future__ import annotations

import sys
from pathlib import Path

from graphlens.file.sae_config import NORMALISATIONS, WEIGHTS, SaeConfig
from graphlens.file.sae_folders import layouts
from tools.generated import with_part, write_or_check

PAGE = Path(__file__).resolve().parents[1] / "docs" / "saes.md"
_FEATURES = {
    "relu": "relu(pre)",
    "gated": "relu(pre) where the gate is above 0",
    "jumprelu": "pre where it is above `threshold` and 0",
    "topk": "the `k` largest of relu(pre)",
}


def page() -> str:
    """docs/saes.md with its tables as they have to be."""
    rows = ["| layout | known by | what is read | the hook point |", "|---|---|---|---|"]
    rows += [
        f"| {each.name} | {', '.join(f'`{name}`' for name in each.files)} | {each.holds} | {each.hook} |"
        for each in layouts()
    ]
    kinds = ["| architecture | weights beside `W_enc`, `W_dec`, `b_dec` | features |", "|---|---|---|"]
    for name, weights in WEIGHTS.items():
        topk, transcoder = name == "topk", name.endswith("transcoder")
        cfg = SaeConfig(name, 1, 1, "x", k=1 if topk else None, apply_b_dec_to_input=not transcoder)
        more = ", or the `k` largest where it has `k`" if transcoder and cfg.activation == "relu" else ""
        kinds.append(
            f"| `{name}` | {', '.join(f'`{weight}`' for weight in weights)} | {_FEATURES[cfg.activation]}{more} |"
        )
    how = f"`normalize_activations` may be {', '.join(f'`{name}`' for name in NORMALISATIONS)}."
    return with_part(PAGE, "tools/sae_tables.py", [*rows, "", *kinds, "", how])


def main(arguments: list[str] | None = None) -> int:
    """Writes the page, or with ``--check`` compares it. Returns the exit code: 1 for a stale page."""
    return write_or_check(PAGE, page, "python -m tools.sae_tables", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
