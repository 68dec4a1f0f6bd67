"""Write docs/parity.md: every hook point beside TransformerLens 3.9's, with the largest difference found.

    python tools/parity_table.py

Runs the parity matrix that the tests assert (tests/parity/matrix.py) and writes what it measured.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "parity"))


def measure(work: Path) -> dict[str, tuple[str, float, float]]:
    """Hook name with the layer as ``i`` -> (shape, largest difference read, largest after an edit)."""
    from matrix import FLAG_SETS, MODELS, pair, prompt

    found: dict[str, tuple[str, float, float]] = {}
    for model in MODELS:
        for processed in (False, True):
            both = pair(model, processed, work)
            for flags in FLAG_SETS.values():
                both.set_flags(flags)
                shapes = both.ours.hook_points()
                axes = both.ours._engine.hooks(both.ours._plan())
                for difference in both.differences(prompt(both, 2, 9)):
                    name = re.sub(r"blocks\.\d+", "blocks.i", difference.hook)
                    shape = (
                        f"[{', '.join(axes[difference.hook].axes)}]" if difference.hook in shapes else "[b, p, d_vocab]"
                    )
                    known = found.get(name, (shape, 0.0, 0.0))
                    found[name] = (known[0], max(known[1], difference.read), max(known[2], difference.edited))
            print(f"{model}, {'processed' if processed else 'unprocessed'}: done", file=sys.stderr)
    return found


def render(found: dict[str, tuple[str, float, float]]) -> str:
    """The page."""
    from matrix import FLAG_SETS, MODELS, TOLERANCE

    from graphlens.hook_points import BRIDGE, BRIDGE_BLOCK, FLAGGED

    four = {f"blocks.i.{ours}": f"blocks.i.{name}" for name, ours in BRIDGE_BLOCK.items()}
    four |= {ours: name for name, ours in BRIDGE.items()}
    rows = []
    for name, (shape, read, edited) in found.items():
        flag = FLAGGED.get(name.removeprefix("blocks.i."), "")
        notes = ", ".join(filter(None, [flag and f"`{flag}`", f"4.x: `{four[name]}`" if name in four else ""]))
        cells = (f"`{name}`", f"`{name}`", shape, f"{read:.1e}", "" if name == "logits" else f"{edited:.1e}", notes)
        rows.append("| " + " | ".join(cells) + " |")
    table = "\n".join(rows)
    worst = max(max(read, edited) for _, read, edited in found.values())
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("transformer-lens", "torch", "transformers", "onnxruntime")
    )
    return f"""# Parity with TransformerLens

Written by `tools/parity_table.py` from the matrix that `tests/parity/test_matrix.py` asserts. Every hook point of
{len(MODELS)} models ({"; ".join(MODELS)}), with weights processed (TransformerLens's defaults) and unprocessed, and with
{len(FLAG_SETS)} sets of flags, on 2 prompts of 9 tokens, in float32.

*Read*: the cached activation. *Edited*: the logits after a Python hook there has put another value at every element.
Both as a share of max(1, max|reference|), the largest over all models and layers; the tests allow {TOLERANCE:.0e}, the
largest here is {worst:.1e}. Cache order is firing order, and equal.

Measured with {versions}, on {platform.machine()}, {os.cpu_count()} cores.

| TransformerLens 3.9 | graphlens | shape | read | edited | flag, other name |
|---|---|---|---|---|---|
{table}

## Where graphlens departs on purpose

- A hook on a point whose flag is off raises and names the flag; TransformerLens lets it never fire.
- A `names_filter` that matches nothing raises with the nearest names; TransformerLens gives an empty cache.
- `pos_slice` slices the position axis of every hook point; TransformerLens slices the head axis of some.
- Without split inputs `ln1` runs once and its hook points fire once; TransformerLens runs it three times on the same
  values. With them it fires for queries, keys and values apart, in both.
- With top_k and top_p both given, `generate` applies them one after the other; TransformerLens leaves out top_p.
- `generate` past n_ctx raises before it starts.
- The prompt's padding is known exactly where text was padded; token ids alone fall back on TransformerLens's rule.
"""


def main() -> None:
    """Measure and write."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRAPHLENS_CACHE"] = f"{folder}/cache"
        page = render(measure(Path(folder)))
    path = ROOT / "docs" / "parity.md"
    path.write_text(page, encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
