"""An open model as a file, also where its weights were set: for jobs that read a file and write a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from graphlens.engine.engine import Engine
from graphlens.file.folder import MODEL_FILE, user_path, working_folder, writing


@contextlib.contextmanager
def as_file(engine: Engine, out: str | os.PathLike[str]) -> Iterator[Path]:
    """A file that computes what an open model computes.

    Args:
        engine: The open model.
        out: The folder that is going to be written.

    Yields:
        The model's own graph file, or where its weights were set that of a folder beside ``out``, which is gone after the
        block.

    Raises:
        ModelFileError: The model's files were replaced since it was opened.
        ExportError: The folder cannot be written.
        InputError: ``out`` is no path.
    """
    engine.files.ensure_unchanged()
    if not engine.replaced:
        yield engine.path
        return
    from graphlens import surgery
    from graphlens.engine.replaced_weights import replace_weights
    from graphlens.surgery.replaced import write_replaced

    found = replace_weights(surgery.load(engine.path), engine.manifest, engine.replaced)
    target = user_path(out)
    with contextlib.ExitStack() as work:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            stage = work.enter_context(working_folder(target.parent, target.name))
            write_replaced(found.model, found.places, found.contents, engine.folder, stage)
        yield stage / MODEL_FILE
