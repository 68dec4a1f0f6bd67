"""Opening sessions that run block by block over a model's files: for models larger than the memory they may take."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from graphlens.engine.opener import Opener
from graphlens.engine.session_pool import POOL
from graphlens.errors import InputError
from graphlens.runtime.mapped_weights import MappedWeights, Place
from graphlens.runtime.providers import CPU, Providers
from graphlens.runtime.sessions import Session, open_session
from graphlens.runtime.staged import Staged, StageSession
from graphlens.runtime.types import Array
from graphlens.views.progress import note

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphlens.engine import packed_weights
    from graphlens.surgery.stages import Stage

_FED = {"float32", "float64", "float16", "bfloat16", "int8", "uint8", "int16", "int32", "int64", "bool"}


class StreamingOpener(Opener):
    """Opens sessions that run stage by stage, over weights that stay in their files. Nothing is packed.

    For its arguments see ``max_memory.opener``.
    """

    in_blocks = True

    def __init__(
        self,
        path: Path,
        model: ir.Model,
        providers: Providers,
        weights: int,
        contents: Mapping[str, Array],
        max_memory: int,
    ) -> None:
        super().__init__(path, model, providers, weights, contents)
        if self.asked_providers[0] != CPU:
            raise InputError("max_memory is for runs on the CPU: leave it out, or ask for providers='cpu'.")
        foreign = sorted({node.op_type for node in model.graph if node.domain})
        if foreign:
            raise InputError(
                f"max_memory: {path} has operators that are not ONNX's ({', '.join(foreign)}), which compute otherwise when "
                "their weights are fed: open it without."
            )
        self._most = max_memory
        self._mapped = MappedWeights(_places(model), contents)
        note(
            f"{path}: {weights / 1e6:,.0f} MB of weights run block by block from their files, under max_memory="
            f"{max_memory / 1e6:,.0f} MB. They are not packed."
        )

    def packed(self) -> None:
        """None: packed weights are a second copy of all of them."""

    def pack(self) -> None:
        """None: see ``packed``."""

    def open(
        self,
        graph: ir.Model,
        packed: packed_weights.Packed | None = None,
        custom_ops: str | None = None,
        one_of_many: bool = False,
    ) -> Staged:
        """Opens the stages of a graph. Those that compute alike share a session.

        Args:
            graph: See ``Opener.open``.
            packed: None.
            custom_ops: See there.
            one_of_many: Stages always take turns.

        Raises:
            InputError: The weights of one stage take more than may be in memory.
            ModelFileError: ONNX Runtime refuses a stage.
        """
        from graphlens.surgery.stages import stages

        name = f"a graph made of {self._path}" if graph is not self._model else str(self._path)
        found = stages(graph)
        wanted = {key for stage in found for key in stage.weights.values()}
        weights = self._mapped
        if not weights.has(wanted):  # some lie in the graph, or were set
            weights = MappedWeights(_places(graph), {**_inline(graph, wanted), **self._contents})
        largest = max(found, key=lambda stage: weights.size(_whole(stage)))
        if (need := weights.size(_whole(largest))) > self._most:
            raise InputError(
                f"max_memory={self._most / 1e6:,.0f} MB is too little for {self._path}: one block, or the unembedding, has "
                f"{need / 1e6:,.0f} MB of weights, so ask for that and what a run's activations take."
            )
        opened = [
            StageSession(
                self._session(stage, custom_ops, name), stage.inputs, stage.weights, stage.outputs, stage.by_row
            )
            for stage in found
        ]
        optional = [str(value.name) for value in graph.graph.inputs if value.is_initializer()]
        return Staged(
            opened,
            weights,
            [str(value.name) for value in graph.graph.inputs if not value.is_initializer()],
            optional,
            [str(value.name) for value in graph.graph.outputs],
            custom_ops is not None,
            name,
        )

    def _session(self, stage: Stage, custom_ops: str | None, name: str) -> Session:
        """The session of a stage. It holds no weights, so that one serves every model with such blocks."""

        def build() -> Session:
            return open_session(stage.graph, [CPU], None, custom_ops, one_of_many=True, name=name)

        found = POOL.get(("stage", hashlib.sha256(stage.graph).digest(), custom_ops), build)
        assert isinstance(found, Session)
        return found


def _inline(graph: ir.Model, weights: Iterable[str]) -> dict[str, Array]:
    """Those of some weights that lie in the graph itself."""
    import onnx_ir as ir

    from graphlens.file.held import HeldTensor

    tensors = {name: graph.graph.initializers[name].const_value for name in weights}
    return {
        name: t.numpy()
        for name, t in tensors.items()
        if t is not None and (isinstance(t, HeldTensor) or not isinstance(t, ir.ExternalTensor))
    }


def _whole(stage: Stage) -> list[str]:
    """The weights that a stage reads from their first byte to their last."""
    return [name for mine, name in stage.weights.items() if mine not in stage.by_row]


def _places(model: ir.Model) -> dict[str, Place]:
    """Where the weights of a graph lie, by initializer. Raises InputError for kinds that ONNX Runtime cannot be fed with."""
    from graphlens.file.stored import in_files, path_of, place_of

    found = {}
    for value, tensor in in_files(model):
        kind = tensor.dtype.numpy().name
        if kind not in _FED:
            raise InputError(f"max_memory: weights of the kind {kind} ({value.name}) cannot be run block by block.")
        shape = tuple(int(str(size)) for size in tensor.shape)
        dtype = "uint16" if kind == "bfloat16" else kind
        found[str(value.name)] = Place(path_of(tensor).resolve(), place_of(tensor)[1], dtype, shape)
    return found
