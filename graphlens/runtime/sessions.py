"""Sessions: opening one over a graph, and running it with zero-copy inputs and outputs."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens.errors import ModelFileError
from graphlens.runtime.providers import CPU, Providers, choose_providers, onnxruntime, require_active

Array = npt.NDArray[Any]
_ERRORS_ONLY = 3
# Microseconds that a session's threads wait for more work before they sleep. Between the operators of a run it is always
# enough; ONNX Runtime's own tens of milliseconds would take a core from whatever session runs next.
_SPIN = "200"


class Session:
    """One ONNX Runtime session. Safe to run from several threads at once."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.providers: list[str] = session.get_providers()
        self.inputs: list[str] = [value.name for value in session.get_inputs()]
        self.optional_inputs: list[str] = [value.name for value in session.get_overridable_initializers()]
        self.outputs: list[str] = [value.name for value in session.get_outputs()]
        self.feedable = frozenset((*self.inputs, *self.optional_inputs))
        self.readable = frozenset(self.outputs)

    def run(
        self,
        outputs: Sequence[str],
        feeds: Mapping[str, Any],
        on_start: Callable[[Callable[[], None]], None] | None = None,
        keep: Collection[str] = (),
    ) -> list[Any]:
        """Runs and returns the named outputs, in order, as arrays that own ONNX Runtime's buffers (no copy on CPU).

        Feeds are arrays or OrtValues of an earlier run; outputs in ``keep`` stay OrtValues, on their device.
        ``on_start`` is handed a function that stops the run early from another thread or from a callback inside it.
        """
        ort = onnxruntime()
        options = ort.RunOptions()
        options.log_severity_level = _ERRORS_ONLY
        if on_start is not None:

            def stop() -> None:
                options.terminate = True

            on_start(stop)
        # The OrtValue aliases the array's memory, so both must live until the run ends: `arrays` keeps them.
        arrays = {name: np.asarray(a, order="C") for name, a in feeds.items() if not isinstance(a, ort.OrtValue)}
        values = {
            name: ort.OrtValue.ortvalue_from_numpy(arrays[name]) if name in arrays else value
            for name, value in feeds.items()
        }
        results = self._results(list(outputs), values, options)
        return [value if name in keep else value.numpy() for name, value in zip(outputs, results, strict=True)]

    def _results(self, outputs: Sequence[str], values: Mapping[str, Any], options: Any) -> list[Any]:
        """The named outputs, in order, of OrtValues by name, as OrtValues."""
        found: list[Any] = self._session.run_with_ort_values(outputs, values, options)
        return found


class Chain(Session):
    """Two sessions that run as one: ``last`` computes its outputs from one that ``first`` calls ``between``."""

    def __init__(self, first: Session, last: Session, between: str) -> None:
        self._first, self._last, self._between = first, last, between
        self.providers = first.providers
        self.inputs, self.optional_inputs, self.feedable = first.inputs, first.optional_inputs, first.feedable
        self.outputs = [*last.outputs, *first.outputs]
        self.readable = frozenset(self.outputs)

    def _results(self, outputs: Sequence[str], values: Mapping[str, Any], options: Any) -> list[Any]:
        late = [name for name in outputs if name in self._last.outputs]
        early = [name for name in outputs if name not in late]
        asked = list(dict.fromkeys([*early, *([self._between] if late else [])]))
        found = dict(zip(asked, self._first._results(asked, values, options), strict=True))
        if late:
            given = self._last._results(late, {self._last.inputs[0]: found[self._between]}, options)
            found.update(zip(late, given, strict=True))
        return [found[name] for name in outputs]


def version() -> str:
    """ONNX Runtime's version."""
    return str(onnxruntime().__version__)


def save_optimised(model: Path, graph: Path, weights: str) -> None:
    """Writes a graph file as ONNX Runtime optimises it for this processor to ``graph``, and its weights, in their plain
    and their packed layout, to the file ``weights`` beside it. Raises ModelFileError where ONNX Runtime cannot."""
    ort = onnxruntime()
    options = _options()
    options.optimized_model_filepath = str(graph)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", weights)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    try:
        ort.InferenceSession(str(model), options, providers=[CPU])
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise ModelFileError(f"{model}: ONNX Runtime could not save it optimised: {error}") from error


def _options() -> Any:
    """Session options that print errors only, and take none from a model file."""
    options = onnxruntime().SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    os.environ.pop("ORT_LOAD_CONFIG_FROM_MODEL", None)
    return options


@functools.cache
def _share_arena() -> None:
    """Registers the arena that sessions may share; others keep their own.

    ONNX Runtime gives every session an arena that only grows, so dozens of them would each hold the largest buffers.
    """
    ort = onnxruntime()
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    exact = ort.OrtArenaCfg({"arena_extend_strategy": 1})  # as much as is asked for, instead of twice as much each time
    # Refused where somebody else has registered one: theirs serves as well. Its exceptions share no base class.
    with contextlib.suppress(Exception):
        ort.create_and_register_allocator(memory, exact)


def open_session(
    model: Path | bytes,
    providers: Providers = None,
    folder: Path | None = None,
    custom_ops: str | None = None,
    one_of_many: bool = False,
) -> Session:
    """Opens a session over a graph file, or over a graph's bytes whose external data lies in ``folder``.

    ``custom_ops`` is a custom-operator library of graphlens's own choosing; a model never names one. ``one_of_many``:
    sessions that take turns, and so share one arena and do not spin when idle.
    Raises RuntimeUnavailable for providers that are not there or not active, ModelFileError for a refused file.
    """
    ort = onnxruntime()
    names, required = choose_providers(providers)
    options = _options()
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if one_of_many:
        _share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    else:
        options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN)
    if custom_ops is not None:
        options.register_custom_ops_library(custom_ops)
    source = str(model) if isinstance(model, Path) else model
    try:
        session = ort.InferenceSession(source, options, providers=names)
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        if not required and names[0] != CPU:
            session = ort.InferenceSession(source, options, providers=[CPU])
        else:
            where = model if isinstance(model, Path) else folder
            raise ModelFileError(f"{where}: ONNX Runtime refuses this model: {error}") from error
    if required:
        require_active(session, names)
    return Session(session)
