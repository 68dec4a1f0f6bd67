"""Whether the files on disk are still those that a model was opened from."""

from __future__ import annotations

from pathlib import Path

from graphlens.errors import ModelFileError
from graphlens.file.digests import Mark, digest_of, settled
from graphlens.file.inside import inside
from graphlens.file.manifest import SEALED_SINCE, Manifest, WeightFile
from graphlens.views.progress import note


class OpenedFiles:
    """The files of an open model. Sessions and weights are read from them later, when they may have been replaced.

    Args:
        graph: The graph file. Make this before it is loaded, so that no change goes unnoticed.

    Attributes:
        identity: The SHA-256 of the graph file, which names the weights by their own digests and says how they were
            processed: it tells this model from any other, whatever they are called.
        version: It and when the graph file was written: who opens the same version shares sessions.
        checked: What was found right when the model was opened, a line per file.
    """

    def __init__(self, graph: Path) -> None:
        self._graph, self._weights = graph, dict[str, WeightFile]()
        inside(graph.parent, graph.name)
        mark = Mark.of(graph)
        self._seen = {graph: _lasting(mark)}
        self.identity = digest_of(graph)
        self.checked: list[str] = []
        self.version = (self.identity, mark and (mark.mtime_ns, mark.inode))

    def add(self, manifest: Manifest) -> None:
        """Adds the weights files, and says so if nothing in the graph file tells whether that is as it was written.

        Args:
            manifest: What the graph file says about itself.

        Raises:
            ModelFileError: A weights file is not, or no more, what its fingerprint says.
        """
        from graphlens.surgery.fingerprint import verify_weights

        if manifest.format_version < SEALED_SINCE:
            note(
                f"{self._graph}: its weights are checked, but the graph itself has no seal (format {manifest.format_version}). "
                f"Add one: graphlens seal {self._graph.parent}"
            )
            self.checked.append(f"{self._graph.name}: no seal (format {manifest.format_version}); structure as allowed")
        else:
            self.checked.append(f"{self._graph.name}: as it was written (its seal fits); structure as allowed")
        self._weights |= manifest.files
        self._seen |= {path: _lasting(Mark.of(path)) for path in (self._graph.parent / name for name in manifest.files)}
        verify_weights(self._graph.parent, manifest.files)  # as they are now: digests are remembered
        self.checked += [
            f"{name}: all {file.size:,} bytes as recorded (SHA-256, read whole now or since they were last touched)"
            for name, file in manifest.files.items()
        ]

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
        for path, seen in list(self._seen.items()):
            now = Mark.of(path)
            if now is None or now != seen:
                self._compare(path, now)

    def ensure_not_written_over(self) -> None:
        """Makes sure that nothing wrote into the weights files, which open sessions have mapped.

        One that was replaced by renaming another is none of theirs: the old one lives on.

        Raises:
            ModelFileError: The content of a file is another.
        """
        for path, seen in self._seen.items():
            if path is self._graph:
                continue  # nothing of it is mapped
            now = Mark.of(path)
            if now is None or now == seen:
                continue
            if seen is None or (now.inode, now.device) == (seen.inode, seen.device):
                self._compare(path, now)

    def _compare(self, path: Path, now: Mark | None) -> None:
        """Refuses a file whose mark moved, unless its content is the same: it was touched, or copied back."""
        from graphlens.surgery.fingerprint import verify_weights

        try:
            if path != self._graph:
                verify_weights(path.parent, {path.name: self._weights[path.name]})
            elif digest_of(path) != self.identity:
                raise ModelFileError("the graph is another")
        except (ModelFileError, OSError) as error:
            raise ModelFileError(
                f"{path}: this file was replaced since the model was opened, so that what is read from it now would not "
                "belong to what was read before. Open the model again, or put the file back."
            ) from error
        self._seen[path] = _lasting(now)


def _lasting(mark: Mark | None) -> Mark | None:
    """The mark; None for a file touched so lately that it may be written again and have the same mark."""
    return mark if mark is not None and settled(mark) else None
