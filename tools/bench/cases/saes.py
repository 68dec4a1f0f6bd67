"""SAEs in the graph: one at a residual stream against its own two products, one at each against SAELens, and putting one in."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from tools.bench.harness import Case, Findings, Row, Setup, Target, rounds, timed, token_ids
from tools.bench.peers import OURS, SAE_LENS, agreement, start, version_notes
from tools.bench.sae_standins import features_of, sae_folders
from tools.bench.side import MKL_NOTE
from tools.bench.workers.protocol import Job

LENGTH = 128
MOST = 1.1  # of the two products' own time, above a plain run
FASTER = 1.5  # times as fast as SAELens
SPLICED = 0.5  # seconds
TOLERANCE = 1e-3


def _products(width: int, features: int, weights: Any, bias: Any) -> Callable[[Any], Any]:
    """A bare session of an SAE's two products and what lies between them, on [1, p, width]."""
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    encoder, decoder = weights
    given = {"W_enc": encoder, "b_enc": bias, "W_dec": decoder}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "W_enc"], ["product"]),
            helper.make_node("Add", ["product", "b_enc"], ["pre"]),
            helper.make_node("Relu", ["pre"], ["post"]),
            helper.make_node("MatMul", ["post", "W_dec"], ["y"]),
        ],
        "two products",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, "p", width])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, "p", width])],
        [numpy_helper.from_array(array, name) for name, array in given.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return lambda x: session.run(["y"], {"x": x})


def _one(setup: Setup) -> list[Row]:
    """What one SAE adds to a run, beside its products alone; and the seconds that putting one in takes."""
    import numpy as np

    from graphlens import HookedTransformer, Sae

    model = HookedTransformer.from_onnx(setup.model.hooked, "cpu")
    layers = model.cfg.n_layers
    folders = sae_folders(setup.model, layers)
    ids = token_ids(setup.model, 1, min(LENGTH, setup.model.n_ctx))
    middle = Sae.from_folder(folders[layers // 2])
    weights = [np.ascontiguousarray(middle.weights[name]) for name in ("W_enc", "W_dec")]
    bare = _products(
        setup.model.d_model, features_of(setup.model), weights, np.ascontiguousarray(middle.weights["b_enc"])
    )
    x = model.run_with_cache(ids, names_filter=middle.cfg.hook)[1][middle.cfg.hook]
    plain = HookedTransformer.from_onnx(setup.model.hooked, "cpu")
    model.add_sae(middle)
    works = {"plain": partial(plain, ids), "one": partial(model, ids), "products": partial(bare, x)}
    found = rounds({name: timed(work) for name, work in works.items()}, setup.repeats, warmup=2)
    added = [one - other for one, other in zip(found["one"], found["plain"], strict=True)]
    ratio = statistics.median(added) / statistics.median(found["products"])
    rows = [
        Row("a run with one SAE", "ms", found["one"], found["plain"]),
        Row("what it adds", "ms", added, found["products"], Target(ratio, MOST, "x", "the two products")),
    ]
    spliced = []
    for folder in folders[: layers // 2]:
        sae = Sae.from_folder(folder)
        began = time.perf_counter()
        model.add_sae(sae)
        model(ids[:, :1])
        spliced.append(time.perf_counter() - began)
        model.reset_saes(sae.cfg.hook)
    rows.append(
        Row(
            "a further SAE, until a run of one token is done",
            "s",
            spliced,
            (),
            Target(statistics.median(spliced), SPLICED, "s"),
        )
    )
    return rows


def run(setup: Setup) -> Findings:
    """Milliseconds a call; ratios of the rows against SAELens below 1 are faster."""
    rows = _one(setup)
    folders = [str(folder) for folder in sae_folders(setup.model, setup.model.n_layers)]
    ids = token_ids(setup.model, 1, min(LENGTH, setup.model.n_ctx)).tolist()
    with ExitStack() as stack:
        jobs = {
            peer: Job("saes", str(setup.model.checkpoint), str(setup.model.hooked), folders, tokens=ids)
            for peer in (OURS, SAE_LENS)
        }
        workers, notes = start(jobs, setup.workdir, stack)
        agreed = agreement({name: worker.check for name, worker in workers.items()}, TOLERANCE)
        for label in workers[OURS.name].labels:
            found = rounds({name: partial(worker.measure, label) for name, worker in workers.items()}, setup.repeats)
            ours, theirs = found[OURS.name], found.get(SAE_LENS.name, ())
            target = None
            if theirs:
                target = Target(statistics.median(ours) / statistics.median(theirs), 1 / FASTER, "x", "SAELens")
            rows.append(Row(f"{len(folders)} SAEs read at hook_sae_acts_post, {label}", "ms", ours, theirs, target))
        notes += version_notes(workers)
        peaks = {name: worker.last_peak() for name, worker in workers.items()}
    if SAE_LENS.name in peaks:
        rows.append(Row("peak memory of a process", "MB", [peaks[OURS.name] / 1e6], [peaks[SAE_LENS.name] / 1e6]))
    said = f"Batch 1, {len(ids[0])} random ids, {features_of(setup.model):,} features each. Weights are random."
    return Findings(
        rows,
        "a plain run; the two products in a bare session; SAELens",
        (*notes, *agreed, said, MKL_NOTE),
    )


CASE = Case(run, repeats=7)
