"""What a harvest costs a core, against a model of that cost, and two of Ray's workers against one process of two threads.

The model (tools/bench/cost.py) counts operations and bytes of a token from the model's sizes. How many of each this machine does
a second is measured in the same process, in bare sessions of one operator each: no harvest is part of it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tools.bench import cost
from tools.bench.children import run_child
from tools.bench.harness import Case, Findings, Row, Setup, Target

CONTEXT, BATCH, ROWS = 128, 16, 48  # tokens of a row; rows of a run; rows of a harvest
RAY_ROWS = 512  # of a harvest by workers, which open the model first
CLOSE = 0.15  # how far the model may be from what is measured
LEAST = 0.85  # of the tokens a second of one process
THREADS = (1, 2)


def _measured(
    folder: str, asked: dict[str, list[str]], vocabulary: int, context: int, batch: int, rows: int, threads: int,
    repeats: int, out: str,
) -> Any:  # fmt: skip
    """Of each harvest tokens a second, and of each kind of work how much is done a second; a list, a round each."""
    import shutil
    import time
    from pathlib import Path

    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    from graphlens import HookedTransformer, harvest
    from graphlens.engine.machine import limit_threads

    limit_threads(threads)
    model = HookedTransformer.from_onnx(folder, "cpu")
    width, count = model.cfg.d_model, batch * context
    random = np.random.default_rng(0)
    ids = random.integers(0, vocabulary, (rows, context))

    def session(kind, inputs, **weights):  # type: ignore[no-untyped-def]
        """One operator, as often as there are weights in its place."""
        kept = [numpy_helper.from_array(array, name) for name, array in weights.items()]
        graph = helper.make_graph(
            [helper.make_node(kind, [*inputs, *weights], ["y"])],
            kind,
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            kept,
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        return onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])

    narrow, wide = (random.standard_normal((count, w), np.float32) for w in (width, 4 * width))
    products = [
        (session("MatMul", ["x"], w=random.standard_normal((width, width), np.float32)), {"x": narrow}, width * width),
        (
            session("MatMul", ["x"], w=random.standard_normal((width, 4 * width), np.float32)),
            {"x": narrow},
            4 * width**2,
        ),
        (session("MatMul", ["x"], w=random.standard_normal((4 * width, width), np.float32)), {"x": wide}, 4 * width**2),
    ]
    other = wide[::-1].copy()
    gelu, add = session("Gelu", ["x"]), session("Add", ["x", "z"])

    def seconds(work, times):  # type: ignore[no-untyped-def]
        start = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - start) / times

    def write():  # type: ignore[no-untyped-def]
        with Path(out, "written").open("wb", buffering=0) as file:
            file.write(narrow.astype(np.float16).data)

    def rates():  # type: ignore[no-untyped-def]
        # As often as blocks have them: four products of the model's width, and one each of the MLP's.
        spent = [seconds(lambda s=s, f=f: s.run(None, f), 4) for s, f, _ in products]
        done = sum(times * 2 * count * size for times, (_, _, size) in zip((4, 1, 1), products, strict=True))
        passing = seconds(lambda: add.run(None, {"x": wide, "z": other}), 4)  # more than caches hold
        function = seconds(lambda: gelu.run(None, {"x": wide}), 4)
        read = 3 * wide.nbytes / passing
        return {
            "products": done / (4 * spent[0] + spent[1] + spent[2]),
            "functions": wide.size / max(function - 2 * wide.nbytes / read, function / 10),
            "read": read,
            "written": narrow.size * 2 / seconds(write, 4),
        }

    def speed(names, length):  # type: ignore[no-untyped-def]
        shutil.rmtree(Path(out, "h"), ignore_errors=True)
        given = ids.reshape(-1, length)
        start = time.perf_counter()
        harvest(model, given, names, Path(out, "h"), dtype="float16", batch_tokens=count, context=length, verbose=False)
        return ids.size / (time.perf_counter() - start)

    found = []
    for number in range(-1, repeats):
        one = {"rates": rates()}
        for label, (length, *names) in asked.items():
            one[label] = speed(names, int(length))
        again = rates()
        one["rates"] = {name: 2 / (1 / rate + 1 / again[name]) for name, rate in one["rates"].items()}
        if number >= 0:
            found.append(one)
    return found


def _on_ray(
    folder: str, names: list[str], vocabulary: int, context: int, batch: int, rows: int, repeats: int, out: str
) -> Any:
    """Tokens a second of one process with two threads, and of two workers with one each, in turns."""
    import shutil
    import time
    from pathlib import Path

    import numpy as np

    from graphlens import HookedTransformer, harvest
    from graphlens.engine.machine import limit_threads

    limit_threads(2)
    model = HookedTransformer.from_onnx(folder, "cpu")
    ids = np.random.default_rng(0).integers(0, vocabulary, (rows, context))
    ways = {"local": {}, "ray": {"engine": "ray", "workers": 2, "threads": 1}}

    def speed(way, given):  # type: ignore[no-untyped-def]
        shutil.rmtree(Path(out, "h"), ignore_errors=True)
        start = time.perf_counter()
        harvest(
            model, given, names, Path(out, "h"), dtype="float16", batch_tokens=batch * context, context=context,
            shard_tokens=4 * batch * context, verbose=False, **ways[way],
        )  # fmt: skip
        return given.size / (time.perf_counter() - start)

    for way in ways:  # starts Ray, and opens sessions
        speed(way, ids[:batch])
    return [{way: speed(way, ids) for way in (ways if number % 2 else reversed(ways))} for number in range(repeats)]


def run(setup: Setup) -> Findings:
    """Tokens a second; ratios of speeds are graphlens's over the model's or over one process's."""
    from graphlens import HookedTransformer

    standin, hooked = setup.model, str(setup.model.hooked)
    config = HookedTransformer.from_onnx(hooked, "cpu").cfg
    layers, context = config.n_layers, min(CONTEXT, config.n_ctx)
    middle = layers // 2
    everything = [f"blocks.{layer}.hook_resid_post" for layer in range(layers)]
    asked: dict[str, tuple[int, int, list[str]]] = {
        f"all resid_post, rows of {context}": (context, layers, everything),
        f"resid_pre of layer {middle}, rows of {context}": (context, middle, [f"blocks.{middle}.hook_resid_pre"]),
        f"all resid_post, rows of {context // 4}": (context // 4, layers, everything),
    }
    given = {label: [str(length), *names] for label, (length, _, names) in asked.items()}
    rows: list[Row] = []
    notes = []
    setup.workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=setup.workdir) as name:
        for threads in THREADS:
            out = Path(name) / str(threads)
            out.mkdir()
            found = run_child(
                _measured, hooked, given, standin.d_vocab, context, BATCH, ROWS, threads, setup.repeats, str(out)
            ).result
            for label, (length, blocks, names) in asked.items():
                each = cost.of_a_token(config, blocks, length, BATCH * context, len(names) * config.d_model * 2)
                measured = [one[label] for one in found]
                model = [1 / each.seconds(one["rates"]) for one in found]
                row = Row(f"{label}, {_threads(threads)}", "tokens/s", measured, model)
                apart = max(abs((row.ratio or 0) - 1), abs((row.paired_ratio or 0) - 1))
                rows.append(Row(row.label, row.unit, measured, model, Target(apart, CLOSE, "", "apart")))
                if threads == 1:
                    notes.append(
                        f"{label}: {each.products / 1e6:,.1f} million operations of products, {each.functions / 1e3:,.0f} "
                        f"thousand of functions, {each.read / 1e6:,.2f} MB in memory, {each.written / 1e3:,.1f} kB to the disk."
                    )
            rates = {key: sorted(one["rates"][key] for one in found)[len(found) // 2] for key in found[0]["rates"]}
            notes.append(
                f"{_threads(threads)}: {rates['products'] / 1e9:,.0f} GFLOP/s of products, {rates['functions'] / 1e9:,.2f} "
                f"billion functions/s, {rates['read'] / 1e9:,.1f} GB/s in memory, {rates['written'] / 1e9:,.2f} GB/s to the disk."
            )
        out = Path(name) / "ray"
        out.mkdir()
        found = run_child(
            _on_ray, hooked, everything, standin.d_vocab, context, BATCH, RAY_ROWS, max(2, setup.repeats // 2), str(out)
        ).result
        ray, local = ([one[way] for one in found] for way in ("ray", "local"))
        row = Row("all resid_post, Ray, 2 workers of a thread", "tokens/s", ray, local)
        least = min(row.ratio or 0, row.paired_ratio or 0)
        rows.append(Row(row.label, row.unit, ray, local, Target(-least, -LEAST, "x", "one process, negative")))
    notes.append(
        f"fp16, written; {BATCH * context} tokens a run. Ray runs already and its workers open the model within the measured "
        f"time, for {RAY_ROWS * context:,} tokens; beside it is one process of two threads."
    )
    return Findings(rows, "the model of cost; for Ray one process", tuple(notes))


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


CASE = Case(run, repeats=5)
