"""Runs of a graph that another program exported: what each of its values is like, and what hook points hold on probes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphlens.errors import ModelFileError, RunError
from graphlens.file.safetensors import Array
from graphlens.runtime.sessions import Session, open_session
from graphlens.surgery.adopted.hooks import Seen

BATCH, LENGTH = 3, 11  # of the run that tells shapes: sizes that models seldom have
_TRIES = (1, 0)  # what tokens, masks, positions and types may all be


def seen_values(model: ir.Model, folder: Path, where: str, image: int | None = None) -> dict[str, Seen]:
    """What each value of a graph is like, found by one run.

    Args:
        model: The graph. Its weights lie in ``folder``.
        folder: See above.
        where: The file's name, for errors.
        image: The height and width of images, where the graph does not say.

    Returns:
        Name -> shape and dtype: the graph's inputs, and every value that a node computes.

    Raises:
        ModelFileError: ONNX Runtime refuses the graph, or its inputs are of no kind that graphlens knows how to feed.
    """
    exposed = model.clone()
    given = {id(value) for value in exposed.graph.outputs}
    for node in exposed.graph:
        for output in node.outputs:
            if output.name and (output.uses() or id(output) in given):
                output.shape, output.type = None, None
                if id(output) not in given:
                    exposed.graph.outputs.append(output)
    session = open_session(_bytes(exposed), "cpu", folder, name=where, as_written=True)
    error: RunError | None = None
    for number in _TRIES:
        feeds = {str(value.name): _example(value, number, where, image) for value in required(model)}
        try:
            found = session.run(session.outputs, feeds)
        except RunError as failed:
            error = failed
            continue
        return {
            name: Seen(tuple(array.shape), str(array.dtype))
            for name, array in (*feeds.items(), *zip(session.outputs, found, strict=True))
        }
    raise ModelFileError(f"{where}: ONNX Runtime cannot run it on a short prompt ({error!s:.400}).") from error


def required(model: ir.Model) -> list[ir.Value]:
    """The inputs that a run must feed."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def _bytes(model: ir.Model) -> bytes:
    """A graph whose weights are in files, for ONNX Runtime. Outputs without a type get theirs from it."""
    proto = ir.to_proto(model)
    for output in proto.graph.output:
        output.ClearField("type")
    del proto.graph.value_info[:]
    return proto.SerializeToString()


def _example(value: ir.Value, number: int, where: str, image: int | None) -> Array:
    """A small array for an input, by its rank and type alone: names are no proof."""
    sizes = None if value.shape is None else [size if isinstance(size, int) else None for size in value.shape]
    dtype = value.dtype
    if sizes is None or dtype is None:
        raise ModelFileError(
            f"{where}: its input {value.name!r} has no type or shape. Give it one (onnx.helper), or use graphlens expose."
        )
    if len(sizes) == 2 and (dtype.is_integer() or dtype == ir.DataType.BOOL):
        shape = [BATCH if sizes[0] is None else sizes[0], LENGTH if sizes[1] is None else sizes[1]]
        return np.full(shape, number, dtype.numpy())
    if len(sizes) == 2 and dtype.is_floating_point():  # a mask of floats
        shape = [BATCH if sizes[0] is None else sizes[0], LENGTH if sizes[1] is None else sizes[1]]
        return np.full(shape, 1, dtype.numpy())
    if len(sizes) == 4 and dtype.is_floating_point() and sizes[1] is not None and sizes[3] is not None and sizes[1] > 3:
        return np.zeros((BATCH if sizes[0] is None else sizes[0], sizes[1], sizes[2] or 0, sizes[3]), dtype.numpy())
    if len(sizes) == 4 and dtype.is_floating_point():
        past = sizes[2] is None and sizes[3] is not None
        if past:
            return np.zeros((BATCH if sizes[0] is None else sizes[0], sizes[1] or 1, 0, sizes[3] or 1), dtype.numpy())
        side = image or 224
        return np.zeros(
            (BATCH if sizes[0] is None else sizes[0], sizes[1] or 3, sizes[2] or side, sizes[3] or side), dtype.numpy()
        )
    raise ModelFileError(
        f"{where}: its input {value.name!r} ({dtype.name} {value.shape}) is none that a transformer of one kind takes. "
        "graphlens expose adds values of any graph as outputs."
    )


def run_probe(session: Session, fetch: Sequence[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What values hold in a run.

    Args:
        session: The session.
        fetch: Names of its outputs.
        feeds: What it is fed.
    """
    wanted = list(dict.fromkeys(fetch))
    return dict(zip(wanted, session.run(wanted, feeds), strict=True))


def open_probe(model: ir.Model, folder: Path, where: str) -> Session:
    """A session over a graph in memory, as it is written.

    Args:
        model: The graph. Its weights lie in ``folder``.
        folder: See above.
        where: The file's name, for errors.
    """
    return open_session(ir.to_proto(model).SerializeToString(), "cpu", folder, name=where, as_written=True)


def probe_tokens(d_vocab: int, rows: int, length: int, seed: int = 0) -> Array:
    """Token ids for a probe, spread over the vocabulary.

    Args:
        d_vocab: How many tokens there are.
        rows: How many prompts.
        length: How many tokens each has.
        seed: Other numbers give other tokens.

    Returns:
        int64 [rows, length].
    """
    return np.random.default_rng(seed).integers(0, d_vocab, (rows, length))


def named(hooks: Mapping[str, str], arrays: Mapping[str, Array], names: Iterable[str]) -> dict[str, Array]:
    """Hook points -> what their values hold.

    Args:
        hooks: Hook point -> the name of its value.
        arrays: Name of a value -> what it holds.
        names: The hook points wanted.
    """
    return {name: arrays[hooks[name]] for name in names if hooks[name] in arrays}
