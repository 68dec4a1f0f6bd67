"""The layout of the Hugging Face hub's cache, whose files are links."""

from __future__ import annotations

import shutil
from pathlib import Path


def in_the_hubs_cache(folder: Path, root: Path) -> Path:
    """A folder as huggingface_hub keeps it: blobs by digest, and a snapshot of links to them. Returns the snapshot."""
    repository = root / "models--someone--hooked"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:064x}"))
    return snapshot
