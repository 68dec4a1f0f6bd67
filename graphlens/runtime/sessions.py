"""Sessions: opening one over a graph, and running it without copying inputs or outputs."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from graphlens.runtime import threads
from graphlens.runtime.ort_errors import opening_failed, ort_errors, run_failed
from graphlens.runtime.providers import (
    CPU,
    Providers,
    choose_providers,
    onnxruntime,
    require_active,
    with_options,
)
from graphlens.runtime.types import Array, DeviceValue, Feed, InferenceSession, RunOptions, SessionOptions

# Is handed a run's options when the run begins: setting their ``terminate`` stops it.
OnStart = Callable[[RunOptions], None]
_ERRORS_ONLY, _NOTHING = 3, 4  # how severe a message must be for ONNX Runtime to print it
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
# Microseconds that a session's threads wait for more work before they sleep. Between the operators of a run it is always
# enough; ONNX Runtime's own tens of milliseconds would take a core from whatever session runs next.
_SPIN = "200"


class Runnable(Protocol):
    """What computes outputs from inputs, all of them by name: one session, or several that run as one.

    Attributes:
        providers: The active execution providers, first choice first.
        inputs: The inputs that must be fed.
        outputs: The outputs, in the graph's order.
        feedable: Every input, those with a default included.
        readable: Every output.
    """

    providers: list[str]
    inputs: list[str]
    outputs: list[str]
    feedable: frozenset[str]
    readable: frozenset[str]

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Feed], on_start: OnStart | None = None) -> list[Array]:
        """Runs, and returns the outputs as arrays. See ``Session.run``."""

    def run_on_device(
        self, outputs: Sequence[str], feeds: Mapping[str, Feed], on_start: OnStart | None = None
    ) -> list[DeviceValue]:
        """Runs, and leaves the outputs on the device that computed them. See ``Session.run_on_device``."""


class Session:
    """One ONNX Runtime session, safe to run from several threads at once. For its attributes see ``Runnable``.

    Args:
        session: The session.
        weights: Arrays that the session computes with where they lie, by initializer.
        name: Its graph, as errors name it.
    """

    def __init__(self, session: InferenceSession, weights: Mapping[str, Array], name: str = "a graph") -> None:
        self._session, self._weights, self._name = session, weights, name
        self.providers: list[str] = session.get_providers()
        self.inputs = [value.name for value in session.get_inputs()]
        self.outputs = [value.name for value in session.get_outputs()]
        self.feedable = frozenset((*self.inputs, *(value.name for value in session.get_overridable_initializers())))
        self.readable = frozenset(self.outputs)

    def declared(self) -> dict[str, tuple[str, tuple[int | str | None, ...]]]:
        """What ONNX Runtime infers of each output: its type, "tensor(float)", and its sizes.

        A size is a number, a name, or None where it is not known. There are none where the rank is not known, either.
        """
        return {value.name: (value.type, tuple(value.shape)) for value in self._session.get_outputs()}

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Feed], on_start: OnStart | None = None) -> list[Array]:
        """Runs the graph and returns some of its outputs as arrays.

        Args:
            outputs: The names of the outputs wanted.
            feeds: Arrays by input name, or what an earlier run left on its device.
            on_start: Is handed the run's options. Their ``terminate`` stops it early, from another thread or a callback inside.

        Returns:
            One array for each name, in the same order. On the CPU they own ONNX Runtime's buffers: nothing is copied.

        Raises:
            RunError: ONNX Runtime could not run the graph.
        """
        return [value.numpy() for value in self.run_on_device(outputs, feeds, on_start)]

    def run_on_device(
        self, outputs: Sequence[str], feeds: Mapping[str, Feed], on_start: OnStart | None = None
    ) -> list[DeviceValue]:
        """Runs the graph and leaves the outputs on the device that computed them.

        Args:
            outputs: See ``run``, as for what follows.
            feeds: See there.
            on_start: See there.

        Returns:
            One value for each name, in the same order.

        Raises:
            RunError: See there.
        """
        ort = onnxruntime()
        options: RunOptions = ort.RunOptions()
        options.log_severity_level = _NOTHING  # what fails, or was stopped, comes as an exception
        if on_start is not None:
            on_start(options)
        # An OrtValue aliases its array's memory, so both must live until the run ends: `arrays` keeps them.
        arrays: dict[str, Array] = {}
        values: dict[str, DeviceValue] = {}
        try:
            for name, feed in feeds.items():
                if isinstance(feed, ort.OrtValue):
                    # What another session left on a GPU is no input of one on the CPU.
                    away = self.providers == [CPU] and feed.device_name() != "cpu"
                    values[name] = ort.OrtValue.ortvalue_from_numpy(feed.numpy()) if away else feed
                else:
                    arrays[name] = np.asarray(feed, order="C")
                    values[name] = ort.OrtValue.ortvalue_from_numpy(arrays[name])
            return self._session.run_with_ort_values(list(outputs), values, options)
        except ort_errors() as error:
            raise run_failed(error, self._name, feeds) from error


class Chain:
    """Two sessions that run as one: ``last`` computes its outputs from one output of ``first``.

    Args:
        first: Takes the inputs.
        last: Runs only when one of its outputs is wanted. It has one input.
        between: The output of ``first`` that ``last`` is fed with.
        only_last: True feeds ``last`` with the last position alone of [batch, position, ...].
    """

    def __init__(self, first: Runnable, last: Runnable, between: str, only_last: bool = False) -> None:
        self._first, self._last, self._between, self._only_last = first, last, between, only_last
        self.providers = first.providers
        self.inputs, self.feedable = first.inputs, first.feedable
        self.outputs = [*last.outputs, *first.outputs]
        self.readable = frozenset(self.outputs)

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Feed], on_start: OnStart | None = None) -> list[Array]:
        """Runs, and returns the outputs as arrays.

        Args:
            outputs: See ``run_on_device``, as for what follows.
            feeds: See there.
            on_start: See there.
        """
        return [value.numpy() for value in self.run_on_device(outputs, feeds, on_start)]

    def run_on_device(
        self, outputs: Sequence[str], feeds: Mapping[str, Feed], on_start: OnStart | None = None
    ) -> list[DeviceValue]:
        """Runs both sessions, or the first alone where nothing of the last is asked for.

        Args:
            outputs: See ``Session.run``, as for what follows.
            feeds: See there.
            on_start: Is called for each session that runs, with the options of that one.

        Returns:
            One value for each name, in the same order.
        """
        late = [name for name in outputs if name in self._last.readable]
        early = [name for name in outputs if name not in self._last.readable]
        asked = list(dict.fromkeys([*early, *([self._between] if late else [])]))
        found = dict(zip(asked, self._first.run_on_device(asked, feeds, on_start), strict=True))
        if late:
            whole = found[self._between]
            given: dict[str, Feed] = {self._last.inputs[0]: whole.numpy()[:, -1:] if self._only_last else whole}
            found.update(zip(late, self._last.run_on_device(late, given, on_start), strict=True))
        return [found[name] for name in outputs]

    def of_last_position(self) -> Chain:
        """The same sessions, of which ``last`` computes the last position alone: logits [batch, 1, tokens]."""
        return Chain(self._first, self._last, self._between, only_last=True)


def version() -> str:
    """ONNX Runtime's version."""
    return str(onnxruntime().__version__)


def save_optimised(model: Path, graph: Path, weights: str) -> None:
    """Writes a graph file as ONNX Runtime optimises it for this processor.

    Args:
        model: The graph file to optimise.
        graph: Where the optimised graph goes.
        weights: The name of the file beside ``graph`` that gets its weights, each in its plain layout and in the one
            that this processor's kernels read.

    Raises:
        ModelFileError: ONNX Runtime cannot load or save the model.
        RunError: There is not enough memory.
    """
    ort = onnxruntime()
    options = _options()
    options.optimized_model_filepath = str(graph)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", weights)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    try:
        ort.InferenceSession(str(model), options, providers=[CPU])
    except ort_errors() as error:
        raise opening_failed(error, f"{model}, to be saved optimised") from error


def _options() -> SessionOptions:
    """Session options that print errors only, and take none from a model file."""
    options: SessionOptions = onnxruntime().SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    os.environ.pop("ORT_LOAD_CONFIG_FROM_MODEL", None)
    options.intra_op_num_threads = threads.limited()
    return options


@functools.cache
def _share_arena() -> None:
    """Registers the arena that sessions may share; others keep their own.

    ONNX Runtime gives every session an arena that only grows, so dozens of them would each hold the largest buffers.
    """
    ort = onnxruntime()
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    exact = ort.OrtArenaCfg({"arena_extend_strategy": 1})  # as much as is asked for, instead of twice as much each time
    # Refused where somebody else has registered one: theirs serves as well.
    with contextlib.suppress(*ort_errors()):
        ort.create_and_register_allocator(memory, exact)


def open_session(
    model: Path | bytes,
    providers: Providers = None,
    folder: Path | None = None,
    custom_ops: str | None = None,
    one_of_many: bool = False,
    name: str | None = None,
    weights: Mapping[str, Array] | None = None,
    as_written: bool = False,
) -> Session:
    """Opens a session.

    Args:
        model: A graph file, or the bytes of a graph.
        providers: The execution providers to ask for. See ``choose_providers``.
        folder: Where the external data of a graph given as bytes lies.
        custom_ops: The library with the graph's custom operators. graphlens alone chooses it: a model never names one. Such a
            graph runs on the CPU, whatever was asked for: on a GPU, runs with Python hooks gave wrong numbers (docs/gpu.md).
        one_of_many: True for sessions that take turns. They share one memory arena, and their idle threads sleep and are few.
        name: The graph, as errors name it; by default its file or folder.
        weights: What some initializers of the graph, whose data lie in files, hold instead: shaped and typed as they
            are, bfloat16 as uint16 words.
        as_written: True runs each node as the graph has it, over the weights where they lie: no node is fused, no weight
            is copied into another layout. For a graph that runs once.

    Raises:
        RuntimeUnavailable: A provider that was asked for is not there or not active.
        ModelFileError: ONNX Runtime refuses the graph.
        RunError: There is not enough memory to open it.
    """
    names, required = choose_providers(providers)
    if custom_ops is not None and names != [CPU]:
        warnings.warn(
            "runs with Python hooks are made on the CPU: on a GPU they gave wrong numbers (docs/gpu.md). Interventions, caches "
            "and gradients run on the GPU.",
            stacklevel=2,
        )
        names = [CPU]
    options = _options()
    # A graph with QuantizeLinear computes what is written, whichever of its values are read: fused to integer operators, the same
    # edit gives other numbers in another graph, and ONNX Runtime 1.32 aborts the process over some graphs with hooks.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if as_written:
        options.graph_optimization_level = onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        # Nodes that read the shape of a value run at once: else it is kept until the end of the run for them.
        options.execution_order = onnxruntime().ExecutionOrder.PRIORITY_BASED
    if one_of_many:
        _share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.intra_op_num_threads = threads.of_each()
    else:
        options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN)
    if weights:
        options.add_external_initializers(list(weights), [as_device_value(array) for array in weights.values()])
    name = name or str(model if isinstance(model, Path) else folder or "a graph")
    try:
        if custom_ops is not None:
            options.register_custom_ops_library(custom_ops)
        session = _opened(model, options, names, may_fall_back=not required)
    except ort_errors() as error:
        raise opening_failed(error, name) from error
    if required:
        require_active(session, names)
    return Session(session, weights or {}, name)


def as_device_value(array: Array) -> DeviceValue:
    """A value over an array's memory, which must live as long. uint16 words are bfloat16, which NumPy lacks.

    Args:
        array: A contiguous array.
    """
    values = onnxruntime().OrtValue
    if array.dtype == np.uint16:
        bfloat16: DeviceValue = values.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
        return bfloat16
    value: DeviceValue = values.ortvalue_from_numpy(array)
    return value


def _opened(
    model: Path | bytes, options: SessionOptions, providers: list[str], may_fall_back: bool
) -> InferenceSession:
    """A session with these providers, or with the CPU alone where they fail and that will do."""
    source = str(model) if isinstance(model, Path) else model
    try:
        session: InferenceSession = onnxruntime().InferenceSession(source, options, providers=with_options(providers))
    except ort_errors():
        if not may_fall_back or providers[0] == CPU:
            raise
        session = onnxruntime().InferenceSession(source, options, providers=[CPU])
    return session
