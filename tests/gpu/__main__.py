"""The product on a GPU beside the CPU: ``python -m tests.gpu [--table docs/gpu.md]``, on a machine that has one.

Needs onnxruntime-gpu (the extra [gpu]) and the embedded models, nothing else. Every row compares CUDAExecutionProvider with the
CPU, whose numbers the other tests hold against transformers and TransformerLens. Ends with 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from graphlens import Ablate, HookedTransformer, Patch, Scale, Steer, adopt
from graphlens.deploy import write_stripped
from graphlens.file.folder import MODEL_FILE
from graphlens.metrics import LogitDiff
from graphlens.patching import get_act_patch_attn_head_out_all_pos, get_act_patch_resid_pre
from graphlens.pipelines.hub import EMBEDDED, embedded_model
from graphlens.surgery.precision import convert_into
from tests.gpu.placed import CPU, CUDA, fallen, placed, tokens_of

Array = npt.NDArray[Any]
Row = tuple[
    str, float, float
]  # what, the largest difference relative to max(1, the largest value), how large it may be
FLOAT32, FLOAT16 = 1e-4, 2e-2
_ABOUT = """# On a GPU

`pip install 'graphlens-onnx[gpu]'` (in place of `[cpu]`), then `providers="cuda"`, or nothing: a GPU that works is used.

`python -m tests.gpu --table docs/gpu.md` wrote this page. It compares CUDAExecutionProvider with the CPU on the embedded models;
runs with Python hooks are made on the CPU. It fails if an operator that computes with activations ran on the CPU. Its logic
is tested on the CPU against itself (`tests/core/test_gpu_rows.py`). Times: [benchmarks-gpu.md](benchmarks-gpu.md).

Products are computed in float32: graphlens switches off TensorFloat-32, which ONNX Runtime uses by default and which keeps 10 of
a float32's 23 bits. Runs with Python hooks are made on the CPU, with a warning: on a GPU they gave wrong numbers
([ADR 3](adr/0003-python-hooks-in-one-gated-session.md)). Interventions say most edits as data, and run on the GPU.

![Differences between the GPU and the CPU, each beside what is allowed](pictures/gpu.svg)
"""
HOOK = "blocks.1.attn.hook_z"


def apart(found: Any, right: Any) -> float:
    """The largest difference of two arrays, relative to max(1, the largest value); masked scores must be masked in both."""
    one, other = (np.asarray(value, np.float64) for value in (found, right))
    finite = np.isfinite(other)
    if one.shape != other.shape or not (np.isfinite(one) == finite).all():
        return float("inf")
    return float(np.abs(one[finite] - other[finite]).max(initial=0) / max(1.0, np.abs(other[finite]).max(initial=0)))


def rows_of(name: str, folder: Path, device: str = "cuda") -> Iterator[Row]:
    """What is compared on one embedded model, between a device and the CPU."""
    gpu, cpu = (HookedTransformer.from_pretrained(name, providers=where) for where in (device, "cpu"))
    tokens, other = tokens_of(cpu.cfg.d_vocab, 2, 13), tokens_of(cpu.cfg.d_vocab, 3, 13)[2:]
    clean = tokens[:1]
    metric = LogitDiff(5, 7)

    def both(what: str, run: Callable[[HookedTransformer], Any], allowed: float = FLOAT32) -> Row:
        return f"{name}: {what}", apart(run(gpu), run(cpu)), allowed

    _, right = cpu.run_with_cache(tokens)
    _, found = gpu.run_with_cache(tokens)
    assert list(found) == list(right)
    yield both("logits", lambda model: model(tokens))
    yield f"{name}: every hook point", max(apart(found[hook], right[hook]) for hook in right), FLOAT32
    hooks = [(HOOK, lambda x, hook: x * 0.5), ("blocks.0.hook_resid_pre", lambda x, hook: x + 1)]
    yield both("Python hooks", lambda model: model.run_with_hooks(tokens, fwd_hooks=hooks))
    every = [(hook, lambda x, hook: x * 0.9) for hook in right]
    yield both("Python hooks at every hook point", lambda model: model.run_with_hooks(tokens, fwd_hooks=every))
    edits = [
        Ablate(HOOK, heads=[0, 2]),
        Scale("blocks.0.hook_mlp_out", 0.5, positions=3),
        Steer("blocks.2.hook_resid_pre", np.ones(cpu.cfg.d_model, np.float32), 0.3),
        Patch("blocks.1.hook_attn_out", right["blocks.1.hook_attn_out"][:, 1], positions=1),
    ]
    yield both("gates", lambda model: model.run_with_interventions(tokens, edits))
    for what, sweep in (("resid_pre", get_act_patch_resid_pre), ("heads", get_act_patch_attn_head_out_all_pos)):
        yield both(f"sweep of {what}", lambda model, sweep=sweep: _swept(model, sweep, clean, other, metric))
    yield both("gradients of every hook point", lambda model: _gradients(model, tokens, metric))
    yield both("generated tokens", lambda model: _generated(model, tokens))
    graph, half = embedded_model(name) / MODEL_FILE, folder / f"{name}-half"
    half.mkdir()
    convert_into(graph, half, "float16")
    exact = HookedTransformer.from_onnx(graph, "cpu")(tokens)
    yield f"{name}: float16", apart(HookedTransformer.from_onnx(half, device)(tokens), exact), FLOAT16
    adopted = _adopted(name, folder)
    there, here = (HookedTransformer.from_onnx(adopted, providers=where) for where in (device, "cpu"))
    _, right = here.run_with_cache(tokens)
    _, found = there.run_with_cache(tokens)
    assert list(found) == list(right)
    yield f"{name}, adopted: every hook point", max(apart(found[hook], right[hook]) for hook in right), FLOAT32
    yield _nothing_fell(name, graph, tokens, folder, [CUDA, CPU] if device == "cuda" else [CPU])


def _adopted(name: str, folder: Path) -> Path:
    """An embedded model without its hook points, adopted as another tool's file would be."""
    write_stripped(embedded_model(name), folder / f"{name}-plain")
    adopt(folder / f"{name}-plain" / MODEL_FILE, folder / f"{name}-adopted", tokenizer=embedded_model(name))
    return folder / f"{name}-adopted"


def _swept(model: HookedTransformer, sweep: Any, clean: Array, other: Array, metric: Any) -> Array:
    """A sweep's values."""
    _, cache = model.run_with_cache(clean)
    return np.asarray(sweep(model, other, cache, metric))


def _gradients(model: HookedTransformer, tokens: Array, metric: Any) -> Array:
    """The gradients of a loss at every hook point, one after the other."""
    _, cache = model.run_with_cache(tokens, incl_bwd=True, return_type="loss")
    return np.concatenate([np.ravel(cache[name]) for name in cache if name.endswith("_grad")])


def _generated(model: HookedTransformer, tokens: Array) -> Array:
    """Greedy tokens."""
    return np.asarray(model.generate(tokens, 12, do_sample=False, verbose=False, return_type="tokens"))


def _nothing_fell(name: str, graph: Path, tokens: Array, folder: Path, providers: list[str]) -> Row:
    """How many operators that compute with activations ran on the CPU though CUDA was asked for: none may."""
    found = placed(graph, {"input_ids": tokens}, providers, folder)
    down = fallen(found)
    return f"{name}: operators that fell to the CPU{': ' + ', '.join(down) if down else ''}", float(len(down)), 0.0


def _machine() -> str:
    """The card, the versions and the commit, in words."""

    def said(*command: str) -> str:
        if shutil.which(command[0]) is None:
            return "unknown"
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().split("\n")[0]

    card = said("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    commit = said("git", "rev-parse", "--short", "HEAD")
    return f"{card}; ONNX Runtime {onnxruntime.__version__}; commit {commit}; {datetime.date.today()}"


def main() -> int:
    """Compares; 1 if anything differs too much, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--table", type=Path, metavar="FILE", help="also write docs/gpu.md, or another file")
    asked = parser.parse_args()
    if CUDA not in onnxruntime.get_available_providers():
        print(f"{CUDA} is not in this ONNX Runtime ({onnxruntime.__version__}): nothing was compared.")
        return 2
    lines, failed = [f"{_machine()}", "", "| what | difference | allowed |", "|---|---:|---:|"], False
    with tempfile.TemporaryDirectory() as made:
        for name in EMBEDDED:
            for what, difference, allowed in rows_of(name, Path(made)):
                failed |= not difference <= allowed
                lines.append(f"| {what} | {difference:.1e} | {allowed:.0e} |")
                print(lines[-1], flush=True)
    if asked.table and not failed:
        asked.table.write_text(f"{_ABOUT}\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
