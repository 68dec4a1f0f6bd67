"""A hub cache in which GPT-2 is the embedded model, for both libraries."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import graphlens

REPOSITORIES = ("openai-community/gpt2", "gpt2")
COMMIT = "1" * 40


def fill(cache: Path) -> None:
    """Lays the embedded checkpoint out as huggingface_hub keeps GPT-2: blobs by digest, and a snapshot of links."""
    source = Path(graphlens.embedded_model())
    for repository in REPOSITORIES:
        folder = cache / ("models--" + repository.replace("/", "--"))
        blobs, snapshot, refs = folder / "blobs", folder / "snapshots" / COMMIT, folder / "refs"
        for one in (blobs, snapshot, refs):
            one.mkdir(parents=True)
        (refs / "main").write_text(COMMIT)
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
