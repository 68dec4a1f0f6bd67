"""Opening sessions over a file's graphs: over the packed weights where they serve, else over the file's own."""

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
    """What opens the file at ``path``, whose graph ``model`` is, and graphs made of it; ``weights`` counts their bytes."""

    def __init__(self, path: Path, model: ir.Model, providers: Providers, weights: int) -> None:
        self._path, self._model, self._providers, self.weights = path, model, providers, weights

    def packed(self) -> packed_weights.Packed | None:
        """The packed weights that sessions on this processor share, if they were made."""
        from graphlens.engine import packed_weights

        return packed_weights.find(self._path) if self._on_cpu() else None

    def pack(self) -> packed_weights.Packed | None:
        """Makes them; None where that is not worth it or not possible (see packed_weights.make)."""
        from graphlens.engine import packed_weights

        return packed_weights.make(self._path, self.weights) if self._on_cpu() else None

    @property
    def asked_providers(self) -> list[str]:
        """The providers that a session is opened with. Raises RuntimeUnavailable for one that is not there."""
        return choose_providers(self._providers)[0]

    def _on_cpu(self) -> bool:
        return self.asked_providers[0] == CPU

    def open(
        self,
        graph: ir.Model,
        packed: packed_weights.Packed | None,
        custom_ops: str | None = None,
        one_of_many: bool = False,
    ) -> Session:
        """A session over a graph; see runtime.open_session for the last two. Raises what that raises."""
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
