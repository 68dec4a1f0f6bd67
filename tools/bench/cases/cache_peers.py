"""A full cache (every hook point) against TransformerLens 3.9 and 4.3 on the same weights.

3.9 comes with the dev extra. 4.3 lives in an environment of its own, which this case makes when it is absent.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tools.bench.children import run_child
from tools.bench.harness import Case, Findings, Row, Setup, Target, against_floor, rounds, timed, token_ids, wait_quiet

NINE, FOUR = 1 / 4, 1 / 2.5
FOUR_VERSION = "4.3.*"
TORCH = "torch==2.13.0"  # a CPU build; unpinned, it brings gigabytes of CUDA

_WORKER = """\
import json, os, sys, time
os.environ["HF_HUB_OFFLINE"] = "1"
import warnings
warnings.simplefilter("ignore")
import logging
logging.disable(logging.WARNING)
import numpy as np
import torch
import transformers
folder, batch, length, vocab = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
hf = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
from transformer_lens.model_bridge import TransformerBridge
tokenizer = None
hf.config._name_or_path = "gpt2"
out = sys.stdout
sys.stdout = sys.stderr
model = TransformerBridge.boot_transformers(folder, hf_model=hf, tokenizer=tokenizer, device="cpu")
ids = torch.from_numpy(np.random.default_rng(0).integers(0, vocab, (batch, length)))
def work():
    with torch.inference_mode():
        return model.run_with_cache(ids)
logits, cache = work()
from importlib.metadata import version
facts = [version("transformer-lens"), version("transformers"), len(cache), logits[0, -1].tolist()]
del logits, cache
print(json.dumps(facts), file=out, flush=True)
for line in sys.stdin:
    started = time.perf_counter()
    result = work()
    elapsed = (time.perf_counter() - started) * 1e3
    del result
    print(json.dumps(elapsed), file=out, flush=True)
import resource
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024), file=out, flush=True)
"""


class _Four:
    """TransformerLens 4.3 in a process of its own that measures a call whenever it is asked."""

    def __init__(self, python: Path, checkpoint: Path, batch: int, length: int, vocabulary: int) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        arguments = [str(python), "-c", _WORKER, str(checkpoint), str(batch), str(length), str(vocabulary)]
        self._process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self.version, self.transformers, self.hook_points, self.last_logits = self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError("TransformerLens 4.3 failed:\n" + self._errors.read()[-3000:])
        return json.loads(line)

    def measure(self) -> float:
        """Milliseconds of one call."""
        assert self._process.stdin is not None
        wait_quiet()  # our session's threads spin a while after a run, and would hold a core meanwhile
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> float:
        """Ends the process: its peak memory in bytes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        peak = float(self._read())
        self._process.wait()
        return peak


def _four_python() -> Path:
    """The interpreter of the environment with TransformerLens 4.3, made if absent. Raises CalledProcessError."""
    folder = Path(tempfile.gettempdir()) / "graphlens-bench" / "peers-transformer-lens-4.3"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "-q", f"transformer-lens=={FOUR_VERSION}", TORCH]
        subprocess.run(install, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        (folder / "ready").touch()
    return python


def _ours_once(hooked: str, ids: list[list[int]]) -> int:
    from graphlens import HookedTransformer

    return len(HookedTransformer.from_onnx(hooked, "cpu").run_with_cache(ids)[1])


def _nine(checkpoint: Path) -> Any:
    sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests" / "parity"))
    from lens_oracle import oracle

    return oracle(checkpoint)


def _memory(setup: Setup, python: Path, batch: int, length: int) -> Row:
    """Peak memory of a fresh process that loads the model and caches everything, ours and 4.3's."""
    model = setup.model
    mine = run_child(_ours_once, str(model.hooked), token_ids(model, batch, length).tolist()).peak_bytes
    theirs = _Four(python, model.checkpoint, batch, length, model.d_vocab).close()
    return Row(
        f"b{batch} s{length}, peak memory of a process, TransformerLens 4.3",
        "MB",
        [mine / 1e6],
        [theirs / 1e6],
        Target(mine / theirs, 1.0, "x", "TransformerLens 4.3"),
    )


def run(setup: Setup) -> Findings:
    """Milliseconds a call, and peak memory of a process that does one."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows: list[Row] = []
    notes = []
    try:
        python: Path | None = _four_python()
    except subprocess.CalledProcessError as error:
        python = None
        notes.append(f"TransformerLens 4.3 NOT MEASURED: its environment could not be made ({error.returncode}).")
    sizes = setup.sizes()[:2]
    if python is not None:
        # First, while this process is small: a child's peak is never below its parent's.
        rows += [_memory(setup, python, *size) for size in sizes]
    import numpy as np
    import torch

    from graphlens import HookedTransformer

    model, nine = HookedTransformer.from_onnx(setup.model.hooked, "cpu"), _nine(setup.model.checkpoint)
    for batch, length in sizes:
        ids = token_ids(setup.model, batch, length)
        tensor = torch.from_numpy(ids)

        def peer(tensor: Any = tensor) -> Any:
            with torch.inference_mode():
                return nine.run_with_cache(tensor)

        contenders: dict[str, Callable[[], float]] = {
            "ours": timed(partial(model.run_with_cache, ids)),
            "3.9": timed(peer),
        }
        four = None
        if python is not None:
            four = _Four(python, setup.model.checkpoint, batch, length, setup.model.d_vocab)
            contenders["4.3"] = four.measure
        found = rounds(contenders, setup.repeats, warmup=2)
        for name, limit in (("3.9", NINE), ("4.3", FOUR)):
            if name not in found:
                continue
            label = f"b{batch} s{length}, TransformerLens {name}"
            rows.append(against_floor(label, found["ours"], found[name], limit if (batch, length) == (1, 16) else None))
        logits = model(ids)
        same = {"3.9": float(np.abs(peer()[0].numpy() - logits).max())}
        if four is not None:
            same["4.3"] = float(np.abs(np.asarray(four.last_logits) - logits[0, -1]).max())
            notes.append(
                f"transformer-lens {four.version} with transformers {four.transformers} caches {four.hook_points} names, "
                f"ours {len(model.hook_dict)}."
            )
            four.close()
        differ = ", ".join(f"{name}'s by {difference:.0e}" for name, difference in same.items())
        notes.append(f"b{batch} s{length}: our logits differ at most from {differ}.")
    return Findings(
        rows,
        "run_with_cache of TransformerLens on the same weights",
        (*notes, "torch's matrix library (MKL) is slow on AMD processors, which favours us there."),
    )


CASE = Case(run, repeats=9)
