"""The layout of the Hugging Face hub's cache, whose files are links."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import graphlens


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


_GPT2 = ("openai-community/gpt2", "gpt2")
_COMMIT = "1" * 40


def embedded_model_as_gpt2(cache: Path) -> None:
    """Puts the embedded checkpoint into a hub cache, in the place of GPT-2."""
    source = Path(graphlens.embedded_model())
    for repository in _GPT2:
        folder = cache / ("models--" + repository.replace("/", "--"))
        blobs, snapshot, refs = folder / "blobs", folder / "snapshots" / _COMMIT, folder / "refs"
        for one in (blobs, snapshot, refs):
            one.mkdir(parents=True)
        (refs / "main").write_text(_COMMIT)
        for number, name in enumerate(
            ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
        ):
            blob = blobs / f"{number:064x}"
            if name == "config.json":  # the hub's old GPT-2 says this twice, and TransformerLens reads the second
                facts = json.loads((source / name).read_text())
                blob.write_text(json.dumps(facts | {"n_ctx": facts["n_positions"]}))
            else:
                shutil.copyfile(source / name, blob)
            (snapshot / name).symlink_to(Path("..", "..", "blobs", blob.name))
