"""Whether the files on disk are still those that a model was opened from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from graphlens.errors import ModelFileError
from graphlens.file.manifest import WeightFile


class OpenedFiles:
    """The files of an open model. Sessions and weights are read from them later, when they may have been replaced.

    Args:
        graph: The graph file. Make this before it is loaded, so that no change goes unnoticed.

    Attributes:
        identity: The SHA-256 of the graph file, which names the weights by their own digests and says how they were
            processed: it tells this model from any other, whatever they are called.
        version: It and when the graph file was written: who opens the same version shares sessions.
    """

    def __init__(self, graph: Path) -> None:
        self._graph, self._weights = graph, dict[str, WeightFile]()
        self._seen = {graph: _mark(graph)}
        self.identity = _digest(graph)
        self.version = (self.identity, *self._seen[graph])

    def add(self, weights: Mapping[str, WeightFile]) -> None:
        """Adds the weights files.

        Args:
            weights: The name of each -> its fingerprint.
        """
        self._weights |= weights
        self._seen |= {path: _mark(path) for path in (self._graph.parent / name for name in weights)}

    def ensure_is(self, identity: str) -> None:
        """Makes sure that these are the files of a model that was open before.

        Args:
            identity: That model's identity.

        Raises:
            ModelFileError: They are another model's.
        """
        if self.identity != identity:
            raise ModelFileError(
                f"{self._graph}: this is another model than the one that was pickled or copied. Put that file back, or pickle "
                "the model that is there now."
            )

    def ensure_unchanged(self) -> None:
        """Makes sure that what is read from the files now belongs to what was read before.

        Raises:
            ModelFileError: A file is gone, or its content is another.
        """
        from graphlens.surgery.fingerprint import verify_weights

        for path, seen in self._seen.items():
            now = _mark(path)
            if now == seen:
                continue
            try:
                if path != self._graph:
                    verify_weights(path.parent, {path.name: self._weights[path.name]})
                elif _digest(path) != self.identity:
                    raise ModelFileError("the graph is another")
            except (ModelFileError, OSError) as error:
                raise ModelFileError(
                    f"{path}: this file was replaced since the model was opened, so that what is read from it now would not "
                    "belong to what was read before. Open the model again, or put the file back."
                ) from error
            self._seen[path] = now  # touched or copied back, with the same content


def _mark(path: Path) -> tuple[int, ...]:
    """What changes when a file is written or replaced; empty where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return ()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
