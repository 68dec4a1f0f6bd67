"""The engine: what was asked for -> which graph -> which session. Where surgery and runtime meet."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens.manifest import HookEntry, Manifest
from graphlens.runtime.callbacks import Callback, PythonCalls, callback_library
from graphlens.runtime.providers import Providers
from graphlens.runtime.sessions import Session, open_session
from graphlens.weights import WeightStore

Array = npt.NDArray[Any]
LOGITS = "logits"

# Sessions of this process, shared by every engine over the same file: a second one would hold the weights again.
_pool: weakref.WeakValueDictionary[tuple[Any, ...], Session] = weakref.WeakValueDictionary()
_pool_lock = threading.RLock()


class Engine:
    """A hooked file ready to run. Opening checks the file (surgery.check, fingerprints) but starts no session."""

    def __init__(self, path: str | os.PathLike[str], providers: Providers = None) -> None:
        from graphlens import surgery
        from graphlens.surgery.files import model_path

        self.path = model_path(path).resolve()
        self.folder = self.path.parent
        self._asked = providers
        self._model = surgery.load(self.path)
        self.manifest: Manifest = surgery.read_manifest(self._model)
        self.hook_names: list[str] = list(self.manifest.hooks)
        self.weights = WeightStore(self.folder, self.manifest.weights)

    @property
    def providers(self) -> list[str]:
        """The execution providers that are active, first choice first."""
        return self._plain.providers

    def run(
        self,
        feeds: Mapping[str, Array],
        fetch: Sequence[str],
        callbacks: Mapping[str, Callback] | None = None,
        logits: bool = True,
    ) -> tuple[Array | None, dict[str, Array]]:
        """Runs the model once: (logits or None, {hook name: activation}).

        ``callbacks`` maps hook names to functions activation -> activation, called in firing order as the run passes
        them; every fetched activation is the one after its own callback. Raises what a callback raised.
        """
        session, hooks = (self._hooked, self._gated_hooks) if callbacks else (self._plain, self.manifest.hooks)
        values = list(dict.fromkeys([*([LOGITS] if logits else []), *(hooks[name].value for name in fetch)]))
        if callbacks:
            from graphlens.surgery.python_gates import RUN_INPUT, gate_input

            index = {name: i for i, name in enumerate(self.hook_names)}
            on = np.asarray(True)
            with PythonCalls({index[name]: callback for name, callback in callbacks.items()}) as calls:
                gates = {gate_input(name): on for name in callbacks}
                # A run that fetches nothing still has to happen: its callbacks may be what it is for.
                results = session.run(values or [LOGITS], {**feeds, **gates, RUN_INPUT: calls.run_id}, calls.on_start)
        else:
            results = session.run(values, feeds) if values else []
        found = dict(zip(values or [LOGITS], results, strict=False))
        return (found[LOGITS] if logits else None), {name: found[hooks[name].value] for name in fetch}

    @cached_property
    def _plain(self) -> Session:
        return self._pooled("plain", lambda: open_session(self.path, self._asked))

    @cached_property
    def _hooked(self) -> Session:
        def build() -> Session:
            import onnx_ir as ir

            library = callback_library()  # first: it says so when the package for Python hooks is missing
            graph = ir.to_proto(self._gated_model).SerializeToString()
            return open_session(graph, self._asked, self.folder, library)

        return self._pooled("python", build)

    @cached_property
    def _gated_model(self) -> Any:
        from graphlens import surgery

        return surgery.with_python_gates(self._model)

    @cached_property
    def _gated_hooks(self) -> Mapping[str, HookEntry]:
        from graphlens import surgery

        return surgery.read_manifest(self._gated_model).hooks

    def _pooled(self, kind: str, build: Any) -> Session:
        stat = self.path.stat()
        asked = tuple(self._asked) if isinstance(self._asked, (list, tuple)) else self._asked
        key = (str(self.path), stat.st_mtime_ns, stat.st_size, stat.st_ino, asked, kind)
        with _pool_lock:
            session = _pool.get(key)
            if session is None:
                session = _pool[key] = build()
            return session
