"""Runs scripts written for TransformerLens on one of the libraries: ``python -m tests.scripts.play LIBRARY OUT SCRIPT...``.

The scripts import ``transformer_lens`` and say ``gpt2-small``, which is the embedded model in a hub cache made on the spot.
Each leaves a dict called ``results``; arrays, numbers and strings of it are what the test compares.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """A result as what JSON can hold."""
    if hasattr(value, "detach"):
        value = value.detach().float().numpy() if value.is_floating_point() else value.numpy()
    if hasattr(value, "AB"):
        return plain(value.AB)
    if isinstance(value, np.ndarray | np.generic):
        return {"shape": list(value.shape), "values": np.asarray(value).ravel().tolist(), "kind": value.dtype.kind}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value


def main() -> None:
    """Plays the scripts, and writes what each left or the traceback that it ended in."""
    library, out, *scripts = sys.argv[1:]
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    began = time.monotonic()
    if library == "graphlens":
        import graphlens.transformer_lens

        graphlens.transformer_lens.install()
    import transformer_lens  # noqa: F401 - either

    played: dict[str, Any] = {"import": {"seconds": time.monotonic() - began}}
    for script in scripts:
        began = time.monotonic()
        torch.manual_seed(0)
        torch.set_grad_enabled(True)
        try:
            left = runpy.run_path(script, run_name="__main__")["results"]
            played[Path(script).stem] = {"results": {name: plain(value) for name, value in left.items()}}
        except Exception:  # noqa: BLE001 - whatever a script ends in is what the test is told
            played[Path(script).stem] = {"error": traceback.format_exc()}
        played[Path(script).stem]["seconds"] = round(time.monotonic() - began, 1)
    Path(out).write_text(json.dumps(played))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # TransformerLens leaves threads of its own
