"""What a session is fed besides the prompt: the arrays of its gates, and the switches of its Python gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from graphlens.engine.plan import Gates
from graphlens.errors import InputError
from graphlens.file.io_names import ATTENTION_MASK, POSITION_IDS, TOKEN_TYPE_IDS
from graphlens.runtime.callbacks import Enough as Enough  # for those that may not import the runtime
from graphlens.runtime.callbacks import PythonCalls
from graphlens.runtime.sessions import Runnable
from graphlens.runtime.types import Array, Callback, DeviceValue, Feed

if TYPE_CHECKING:
    from graphlens.engine.graphs import Firing
    from graphlens.file.manifest import Manifest


def gate_feeds(edits: Mapping[str, Mapping[str, Array]], gates: Gates) -> dict[str, Array]:
    """The feeds of gates.

    Args:
        edits: The arrays of each gate: firing of a hook point -> part ("scale", "add", "where", "patch") -> array.
        gates: The gates of the plan.
    """
    from graphlens.surgery.gates import gate_input

    return {gate_input(name, part): array for name, _ in gates for part, array in edits.get(name, {}).items()}


def ensure_heeded(feeds: Mapping[str, Feed], manifest: Manifest, ends_in_logits: bool) -> None:
    """Refuses a mask with padding, or types of tokens, that an adopted file would not look at, and logits that it lacks.

    Args:
        feeds: What a run is fed.
        manifest: What the file says about itself.
        ends_in_logits: True if the run is for the logits, or for gradients of what is computed from them.

    Raises:
        InputError: The original has no such input, or no logits.
    """
    adopted = manifest.adopted
    if adopted is None:
        return
    if adopted.headless and ends_in_logits:
        raise InputError(
            f"{manifest.config.model_name} was adopted from {adopted.file}, which ends in hidden states and gives no logits: run "
            "it with return_type=None and read hook points (run_with_cache), or stop at a layer. Generation, losses and metrics "
            "need an export with the model's head."
        )
    mask = feeds.get(ATTENTION_MASK)
    if adopted.left_padding == "seen" and isinstance(mask, np.ndarray) and (mask[:, 0] == 0).any():
        raise InputError(
            f"{manifest.config.model_name} was adopted from {adopted.file}, whose attention does not mask padding on the left: a "
            "prompt padded there would be computed as another. Pad on the right, or run prompts of one length."
        )
    for name, usual in ((ATTENTION_MASK, 1), (TOKEN_TYPE_IDS, 0)):
        feed = feeds.get(name)
        if name not in adopted.inputs and isinstance(feed, np.ndarray) and (feed != usual).any():
            raise InputError(
                f"{manifest.config.model_name} was adopted from {adopted.file}, which has no input {name}: it would be computed "
                "as if there was none. Run prompts of one length together, or one at a time."
            )


def without_idle_inputs(feeds: Mapping[str, Feed], session: Runnable) -> dict[str, Feed]:
    """The feeds without a mask, positions and types that the session has no input for: a segment without blocks reads none."""
    return {
        name: feed
        for name, feed in feeds.items()
        if name in session.feedable or name not in (ATTENTION_MASK, POSITION_IDS, TOKEN_TYPE_IDS)
    }


def run_with_callbacks(
    session: Runnable,
    firings: Mapping[str, Sequence[Firing]],
    outputs: Sequence[str],
    feeds: Mapping[str, Feed],
    callbacks: Mapping[str, Callback],
) -> dict[str, DeviceValue]:
    """Runs a graph that has Python gates.

    Args:
        session: The session of the graph.
        firings: The firings of each hook point. A Python gate knows its own by its place in the graph's hook map.
        outputs: The names of the outputs wanted.
        feeds: What the run is fed, Python gates apart.
        callbacks: Functions by hook point. They are called in firing order, at every firing of the hook point.

    Returns:
        The outputs by name.

    Raises:
        Exception: Whatever a callback raised.
    """
    from graphlens.surgery.python_gates import RUN_INPUT, gate_input

    called: dict[int, Callback] = {}
    gates: dict[str, Array] = {}
    on = np.asarray(True)
    for hook, callback in callbacks.items():
        for firing in firings[hook]:
            called[firing.place] = _in_half(callback) if firing.entry.dtype == "float16" else callback
            gates[gate_input(firing.name)] = on
    calls = PythonCalls(called)
    fed = {**feeds, **gates, RUN_INPUT: calls.run_id}
    values = calls.run(lambda: session.run_on_device(outputs, fed, calls.on_start))
    return dict(zip(outputs, values, strict=True))


def _in_half(callback: Callback) -> Callback:
    """A callback of float16 activations for an operator that works in float32."""
    return lambda activation: callback(activation.astype(np.float16)).astype(np.float32)
