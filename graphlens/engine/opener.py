"""Opening sessions over a file's graphs: over the packed weights if there are any, else over the file's own weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from graphlens.errors import ModelFileError
from graphlens.runtime.providers import CPU, Providers, choose_providers
from graphlens.runtime.sessions import Runnable, open_session
from graphlens.runtime.types import Array

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from graphlens.engine import packed_weights


class Opener:
    """Opens sessions over the graph of one file and over graphs made of it.

    Args:
        path: The graph file.
        model: Its graph.
        providers: The execution providers asked for. See ``choose_providers``.
        weights: How many bytes its weights have.
        contents: What initializers hold in place of what the file holds. Packed weights, which are the file's, are then
            left alone.

    Attributes:
        in_blocks: Whether its sessions run block by block, fused otherwise: their results differ in the last bits.
    """

    in_blocks = False

    def __init__(
        self, path: Path, model: ir.Model, providers: Providers, weights: int, contents: Mapping[str, Array]
    ) -> None:
        self._path, self._model, self._providers, self._weights = path, model, providers, weights
        self._contents = contents

    def packed(self) -> packed_weights.Packed | None:
        """The packed weights that sessions on this processor share, or None if they were not made."""
        from graphlens.engine import packed_weights

        return packed_weights.find(self._path) if self._may_pack() else None

    def pack(self) -> packed_weights.Packed | None:
        """Makes the packed weights. Returns None where that is not worth it or not possible: see packed_weights.make."""
        from graphlens.engine import packed_weights

        return packed_weights.make(self._path, self._weights) if self._may_pack() else None

    @property
    def asked_providers(self) -> list[str]:
        """The execution providers that a session is opened with, first choice first.

        Raises:
            RuntimeUnavailable: One that was asked for is not there.
        """
        return choose_providers(self._providers)[0]

    def _may_pack(self) -> bool:
        """Whether sessions compute with the file's weights on this processor, whose packed weights are the only ones."""
        return not self._contents and self.asked_providers[0] == CPU

    def open(
        self,
        graph: ir.Model,
        packed: packed_weights.Packed | None,
        custom_ops: str | None = None,
        one_of_many: bool = False,
    ) -> Runnable:
        """Opens a session over a graph. Packed weights that ONNX Runtime refuses are removed and done without.

        Args:
            graph: The file's graph, or one made of it.
            packed: The packed weights to share, if any.
            custom_ops: The library with the graph's custom operators: see ``open_session``.
            one_of_many: True for sessions that take turns: see ``open_session``.

        Raises:
            RuntimeUnavailable: An execution provider is not there or not active.
            ModelFileError: ONNX Runtime refuses the graph.
            RunError: There is not enough memory.
        """
        from graphlens.file.held import held_arrays

        name = f"a graph made of {self._path}" if graph is not self._model else str(self._path)
        elsewhere = held_arrays(graph)
        bound = None if packed is None else packed.bind(graph)
        if packed is not None and bound is not None:
            from graphlens.engine import packed_weights

            try:
                return open_session(bound, self._providers, packed.folder, custom_ops, one_of_many, name, elsewhere)
            except ModelFileError:  # whatever is wrong with the copy, the file itself can still be opened
                packed_weights.discard(packed)
        there = {key: content for key, content in self._contents.items() if key in graph.graph.initializers} | elsewhere
        if graph is self._model:
            return open_session(self._path, self._providers, None, None, False, name, there)
        import onnx_ir as ir

        proto = ir.to_proto(graph)
        folder = _without_links(proto, self._path.parent)
        return open_session(proto.SerializeToString(), self._providers, folder, custom_ops, one_of_many, name, there)


def _without_links(proto: onnx.ModelProto, folder: Path) -> Path:
    """Points a graph, in place, at the files behind links: those of the hub's cache. Returns the folder that they lie in.

    Of a graph that is no file, ONNX Runtime takes no weights through a link that leaves the folder it was told.
    """
    places = [
        entry
        for initializer in proto.graph.initializer
        for entry in initializer.external_data
        if entry.key == "location"
    ]
    files: dict[str, Path] = {name: (folder / name).resolve() for name in {entry.value for entry in places}}
    homes = {file.parent for file in files.values()}
    if len(homes) != 1 or homes == {folder}:
        return folder
    for entry in places:
        entry.value = files[entry.value].name
    return homes.pop()
