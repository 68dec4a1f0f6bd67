"""Opening sessions over a file's graphs: over the packed weights if there are any, else over the file's own weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from graphlens.errors import ModelFileError
from graphlens.runtime.providers import CPU, Providers, choose_providers
from graphlens.runtime.sessions import Session, open_session

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphlens.engine import packed_weights


class Opener:
    """Opens sessions over the graph of one file and over graphs made of it.

    Args:
        path: The graph file.
        model: Its graph.
        providers: The execution providers asked for. See ``choose_providers``.
        weights: How many bytes its weights have.
    """

    def __init__(self, path: Path, model: ir.Model, providers: Providers, weights: int) -> None:
        self._path, self._model, self._providers, self._weights = path, model, providers, weights

    def packed(self) -> packed_weights.Packed | None:
        """The packed weights that sessions on this processor share, or None if they were not made."""
        from graphlens.engine import packed_weights

        return packed_weights.find(self._path) if self._on_cpu() else None

    def pack(self) -> packed_weights.Packed | None:
        """Makes the packed weights. Returns None where that is not worth it or not possible: see packed_weights.make."""
        from graphlens.engine import packed_weights

        return packed_weights.make(self._path, self._weights) if self._on_cpu() else None

    @property
    def asked_providers(self) -> list[str]:
        """The execution providers that a session is opened with, first choice first.

        Raises:
            RuntimeUnavailable: One that was asked for is not there.
        """
        return choose_providers(self._providers)[0]

    def _on_cpu(self) -> bool:
        """Whether sessions run on this processor, whose packed weights are the only ones there are."""
        return self.asked_providers[0] == CPU

    def open(
        self,
        graph: ir.Model,
        packed: packed_weights.Packed | None,
        custom_ops: str | None = None,
        one_of_many: bool = False,
    ) -> Session:
        """Opens a session over a graph. Packed weights that ONNX Runtime refuses are removed and done without.

        Args:
            graph: The file's graph, or one made of it.
            packed: The packed weights to share, if any.
            custom_ops: The library with the graph's custom operators: see ``open_session``.
            one_of_many: True for sessions that take turns: see ``open_session``.

        Raises:
            RuntimeUnavailable: An execution provider is not there or not active.
            ModelFileError: ONNX Runtime refuses the graph.
        """
        bound = None if packed is None else packed.bind(graph)
        if packed is not None and bound is not None:
            from graphlens.engine import packed_weights

            try:
                return open_session(bound, self._providers, packed.folder, custom_ops, one_of_many)
            except ModelFileError:  # whatever is wrong with the copy, the file itself can still be opened
                packed_weights.discard(packed)
        if graph is self._model:
            return open_session(self._path, self._providers)
        import onnx_ir as ir

        data = ir.to_proto(graph).SerializeToString()
        return open_session(data, self._providers, self._path.parent, custom_ops, one_of_many)
