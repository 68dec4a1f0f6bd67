"""Runs a script of TransformerLens's kind on TransformerLens 3.9 or on graphlens, and keeps its numbers.

    python tests/scripts/run.py theirs|ours SCRIPT NUMBERS.npz

The script imports transformer_lens as it pleases, and has ``model``: the embedded tiny-gpt2, unprocessed or, where the script
has a line ``# processed``, as from_pretrained has it. What it puts into ``results`` is written.
"""

from __future__ import annotations

import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parity"))


def loaded(library: str, processed: bool) -> Any:
    """The embedded model in a library."""
    if library == "ours":
        import graphlens.transformer_lens

        graphlens.transformer_lens.install()
        from transformer_lens import HookedTransformer

        assert HookedTransformer is graphlens.transformer_lens.HookedTransformer
        name = "from_pretrained" if processed else "from_pretrained_no_processing"
        return getattr(HookedTransformer, name)("tiny-gpt2")
    from lens_oracle import PROCESSING, oracle

    import graphlens

    return oracle(graphlens.embedded_model(), tokenizer=True, **dict.fromkeys(PROCESSING, processed))


def main(library: str, script: str, numbers: str) -> None:
    """Runs the script."""
    results: dict[str, Any] = {}
    model = loaded(library, "\n# processed\n" in Path(script).read_text(encoding="utf-8"))
    runpy.run_path(script, {"model": model, "results": results})
    arrays = {
        name: value.detach().numpy() if hasattr(value, "detach") else np.asarray(value)
        for name, value in results.items()
    }
    np.savez(numbers, **arrays)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
