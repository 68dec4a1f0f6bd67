"""Harvests against bare sessions on the same cut graph with the same fetches, results dropped: speed, memory, reading."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.bench.children import run_child
from tools.bench.harness import Case, Findings, Row, Setup, Target, rounds, wait_quiet

CONTEXT, ROWS, BATCH = 128, 64, 16  # tokens of a row; rows of a round; rows of a run
LEAST = 0.92  # of the bare session's tokens a second
ALLOWED = 200.0  # MB of peak memory beside the bare session's and one batch of activations
DRIFT = 20.0  # MB between a short and a long harvest
SHORT, LONG, REDUCED = 50_000, 200_000, 1_000_000  # tokens
FASTEST = 1.0  # GB/s of shuffled batches


def _ids(vocabulary: int, rows: int, context: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, vocabulary, (rows, context))


def _harvest(
    folder: str, names: list[str], vocabulary: int, tokens: int, context: int, out: str, options: dict[str, Any]
) -> Any:
    """One harvest in a process of its own: its highest anonymous memory in bytes, and its seconds."""
    import threading
    import time
    from pathlib import Path

    import numpy as np

    from graphlens import HookedTransformer, harvest

    model = HookedTransformer.from_onnx(folder, "cpu")
    ids = np.random.default_rng(0).integers(0, vocabulary, (tokens // context, context))
    highest, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    highest[0] = max(highest[0], int(line.split()[1]) * 1024)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    harvest(model, ids, names, out, verbose=False, **options)
    seconds = time.perf_counter() - start
    stop.set()
    return {"anonymous": highest[0], "seconds": seconds}


def _bare(folder: str, graph: str, outputs: list[str], vocabulary: int, tokens: int, context: int, batch: int) -> Any:
    """The same runs in a bare session, results dropped."""
    import threading
    from pathlib import Path

    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    session = onnxruntime.InferenceSession(Path(graph).read_bytes(), options, providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(0, vocabulary, (tokens // context, context))
    highest, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    highest[0] = max(highest[0], int(line.split()[1]) * 1024)

    threading.Thread(target=watch, daemon=True).start()
    for first in range(0, len(ids), batch):
        session.run(outputs, {"input_ids": ids[first : first + batch]})
    stop.set()
    return {"anonymous": highest[0]}


def _cut(folder: str, names: list[str], graph: str) -> list[str]:
    """Writes the graph that ends with some hook points. Returns the names of its outputs."""
    from pathlib import Path

    import onnx_ir as ir

    from graphlens import surgery

    found = surgery.prune(surgery.load(Path(folder) / "model.onnx"), names)
    Path(graph).write_bytes(ir.to_proto(found).SerializeToString())
    return [str(value.name) for value in found.graph.outputs]


def run(setup: Setup) -> Findings:
    """Tokens a second, MB and GB a second; ratios of speeds above 1 are faster than the floor."""
    import onnxruntime

    from graphlens import HookedTransformer, harvest

    standin, hooked = setup.model, str(setup.model.hooked)
    model = HookedTransformer.from_onnx(hooked, "cpu")
    layers, context = model.cfg.n_layers, min(CONTEXT, model.cfg.n_ctx)
    wanted = {
        "all resid_post": [f"blocks.{layer}.hook_resid_post" for layer in range(layers)],
        f"resid_pre of layer {layers // 2}": [f"blocks.{layers // 2}.hook_resid_pre"],
    }
    ids = _ids(standin.d_vocab, ROWS, context)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=setup.workdir) as name:
        work = Path(name)
        full = _session(onnxruntime, str(standin.stripped.parent), standin.stripped.read_bytes())
        for label, names in wanted.items():
            graph = str(work / "cut.onnx")
            outputs = run_child(_cut, hooked, names, graph).result
            bare = _session(onnxruntime, hooked, Path(graph).read_bytes())

            def ours(names: list[str] = names) -> None:
                shutil.rmtree(work / "h", ignore_errors=True)
                harvest(
                    model,
                    ids,
                    names,
                    work / "h",
                    dtype="float16",
                    batch_tokens=BATCH * context,
                    context=context,
                    verbose=False,
                )

            def floor(bare: Any = bare, outputs: list[str] = outputs) -> None:
                for first in range(0, ROWS, BATCH):
                    bare.run(outputs, {"input_ids": ids[first : first + BATCH]})

            def whole() -> None:
                for first in range(0, ROWS, BATCH):
                    full.run(["logits"], {"input_ids": ids[first : first + BATCH]})

            found = rounds(
                {"ours": _speed(ours, ids.size), "floor": _speed(floor, ids.size), "full": _speed(whole, ids.size)},
                setup.repeats,
            )
            row = Row(f"{label}, fp16, written", "tokens/s", found["ours"], found["floor"])
            ratio = min(row.ratio or 0, row.paired_ratio or 0)
            rows.append(
                Row(row.label, row.unit, row.ours, row.floor, Target(-ratio, -LEAST, "x", "the floor, negative"))
            )
            rows.append(Row(f"{label}, beside a full forward", "tokens/s", found["ours"], found["full"]))
        rows += _memory(setup, work, wanted["all resid_post"], context)
        rows.append(_reading(setup, work, model))
    note = (
        f"Rows of {context} random ids, {BATCH} a run, {ROWS} a round. Memory is the highest RssAnon of a process of its own. "
        "The last memory row reduces hook_embed alone; the others harvest all resid_post."
    )
    return Findings(rows, "bare InferenceSession, results dropped", (note,))


def _session(onnxruntime: Any, folder: str, graph: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _speed(work: Callable[[], None], tokens: int) -> Callable[[], float]:
    def measured() -> float:
        wait_quiet()
        start = time.perf_counter()
        work()
        return tokens / (time.perf_counter() - start)

    return measured


def _memory(setup: Setup, work: Path, names: list[str], context: int) -> list[Row]:
    """MB: the peak beside a bare session's, and what longer harvests need more."""
    hooked, vocabulary = str(setup.model.hooked), setup.model.d_vocab
    scale = 1 if setup.model.weights_bytes > 100_000_000 else 10  # a small model's are short
    graph = str(work / "cut.onnx")
    outputs = run_child(_cut, hooked, names, graph).result
    options = {"dtype": "float16", "batch_tokens": BATCH * context, "context": context}

    def peak(tokens: int, names: list[str], **more: Any) -> float:
        shutil.rmtree(work / "h", ignore_errors=True)
        found = run_child(_harvest, hooked, names, vocabulary, tokens, context, str(work / "h"), {**options, **more})
        return float(found.result["anonymous"]) / 1e6

    bare = run_child(_bare, hooked, graph, outputs, vocabulary, SHORT // 5 // scale, context, BATCH)
    floor = float(bare.result["anonymous"]) / 1e6
    short, long = peak(SHORT // scale, names), peak(LONG // scale, names)
    held = BATCH * context * len(names) * setup.model.d_model * 4 / 1e6
    least = peak(REDUCED // 10 // scale, ["hook_embed"], reduce=["variance", "top"])
    most = peak(REDUCED // scale, ["hook_embed"], reduce=["variance", "top"])
    above = Target(short - floor - held, ALLOWED, "MB", "above floor and batch")
    drift, reduced = Target(long - short, DRIFT, "MB", "more"), Target(most - least, DRIFT, "MB", "more")
    return [
        Row("peak, all resid_post", "MB", [short], [floor], above),
        Row(f"{LONG // scale:,} tokens beside {SHORT // scale:,}", "MB", [long], [short], drift),
        Row(f"reduced, {REDUCED // scale:,} tokens beside {REDUCED // 10 // scale:,}", "MB", [most], [least], reduced),
    ]


def _reading(setup: Setup, work: Path, model: Any) -> Row:
    """GB a second of shuffled batches from the page cache, a new seed each round."""
    from graphlens import harvest

    shutil.rmtree(work / "h", ignore_errors=True)
    tokens = 400_000_000 // (2 * model.cfg.d_model)
    ids = _ids(setup.model.d_vocab, tokens // CONTEXT, min(CONTEXT, model.cfg.n_ctx))
    found = harvest(model, ids, "hook_embed", work / "h", dtype="float16", verbose=False)
    size = len(found) * 2 * model.cfg.d_model / 1e9
    seeds = iter(range(1000))

    def measured() -> float:
        start = time.perf_counter()
        for _ in found.batches(4096, seed=next(seeds)):
            pass
        return size / (time.perf_counter() - start)

    speed = rounds({"ours": measured}, setup.repeats)["ours"]
    middle = sorted(speed)[len(speed) // 2]
    return Row("shuffled batches of 4096", "GB/s", speed, (), Target(-middle, -FASTEST, "GB/s", "negative"))


CASE = Case(run, repeats=7)
