"""Adopting a file that torch exported, and its int8 form, in a fresh process: until the hooked folder is there."""

from __future__ import annotations

import shutil
import statistics
import uuid
from functools import partial
from pathlib import Path

from tools.bench.children import ChildRun, run_child
from tools.bench.harness import Case, Findings, Row, Setup, Target, rounds
from tools.bench.standin import prepare

SECONDS_LIMIT, TINY_SECONDS_LIMIT = 20.0, 3.0
MEMORY_LIMIT = 1.3  # times the weights
_KINDS = {"float32": "model.onnx", "int8": "int8.onnx"}
_LEAST = "tiny-gpt2"  # whose adopting takes what any adopting takes


def foreign_files(hooked: str, folder: str, checkpoint: str) -> None:
    """Writes model.onnx as torch's older exporter does, and int8.onnx as onnxruntime quantises it."""
    import logging
    from pathlib import Path

    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import AutoModelForCausalLM

    class Logits(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32).eval()
    out = Path(folder).with_suffix(".partial")
    out.mkdir(parents=True, exist_ok=True)
    names = ["input_ids", "attention_mask"]
    ids = torch.randint(0, 50, (2, 7))
    torch.onnx.export(
        Logits(model),
        (ids, torch.ones_like(ids)),
        str(out / "model.onnx"),
        input_names=names,
        output_names=["logits"],
        dynamic_axes={key: {0: "batch", 1: "sequence"} for key in (*names, "logits")},
        opset_version=17,
        dynamo=False,
    )
    logging.disable(logging.WARNING)
    quantize_dynamic(str(out / "model.onnx"), str(out / "int8.onnx"), weight_type=QuantType.QInt8, per_channel=True)
    out.rename(folder)


def _adopt(file: str, out: str) -> dict[str, int]:
    import graphlens

    report = graphlens.adopt(file, out, announce=lambda _: None)
    return {"hooks": len(report.hooks), "identities": len(report.identities)}


def _adopt_once(file: Path, beside: Path) -> ChildRun:
    """Adopts into a new folder, and deletes it."""
    out = beside / f"adopted-{uuid.uuid4().hex[:8]}"
    try:
        return run_child(_adopt, str(file), str(out))
    finally:
        shutil.rmtree(out, ignore_errors=True)


def run(setup: Setup) -> Findings:
    """Seconds from starting the process to the finished folder, imports included, and peak resident memory."""
    folder = setup.model.made("foreign", foreign_files, str(setup.model.checkpoint))
    files = {kind: folder / name for kind, name in _KINDS.items()}
    tiny = setup.model.name == "tiny"  # the interpreter takes more memory than its weights
    smallest = prepare("tiny", setup.workdir)
    least = smallest.made("foreign", foreign_files, str(smallest.checkpoint)) / _KINDS["float32"]
    every = {**files, _LEAST: least}
    contenders = {kind: partial(_adopt_once, file, setup.model.workdir) for kind, file in every.items()}
    found = rounds(contenders, setup.repeats, warmup=0)
    own = statistics.median(child.peak_bytes for child in found.pop(_LEAST)) / 1e6
    limit = TINY_SECONDS_LIMIT if tiny else SECONDS_LIMIT
    rows: list[Row] = []
    for kind, children in found.items():
        seconds, memory = [child.seconds for child in children], [child.peak_bytes / 1e6 for child in children]
        weights = files[kind].stat().st_size / 1e6
        rows += (
            Row(f"{kind}, wall", "s", seconds, target=Target(statistics.median(seconds), limit, "s")),
            Row(
                f"{kind}, peak memory",
                "MB",
                memory,
                target=None if tiny else Target(statistics.median(memory) / weights, MEMORY_LIMIT, "x", "the file"),
            ),
        )
        if not tiny:
            above = [each - own for each in memory]
            target = Target(statistics.median(above) / weights, MEMORY_LIMIT, "x", "the file")
            rows.append(Row(f"{kind}, peak memory above that of adopting tiny-gpt2", "MB", above, target=target))
    notes = [f"Adopting tiny-gpt2, a file of 4 MB, peaks at {own:.0f} MB: libraries, and a small graph."] + [
        f"{kind}: {files[kind].stat().st_size / 1e6:,.1f} MB, {children[-1].result['hooks']} hook points, "
        f"{children[-1].result['identities']} identities."
        for kind, children in found.items()
    ]
    return Findings(tuple(rows), notes=tuple(notes))


CASE = Case(run, repeats=3, model="llama-135m")
