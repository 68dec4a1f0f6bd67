"""Giving a model to others: a hooked folder with a model card, and the same as a repository on the Hugging Face hub.

Knows alone what the card of a hooked folder says.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from graphlens.engine.engine import Engine
from graphlens.errors import ExportError, InputError
from graphlens.file.folder import SETTINGS, copy_settings, new_folder, refuse_occupied, user_path
from graphlens.file.manifest import Manifest
from graphlens.file.private_paths import public_name, remove_private_paths
from graphlens.pipelines.with_weights import as_file

CARD = "README.md"
_CLASSES = {"decoder": "HookedTransformer", "encoder": "HookedEncoder", "vision model": "HookedViT"}
_TASKS = {"decoder": "text-generation", "encoder": "fill-mask", "vision model": "image-classification"}


def save_hooked(
    engine: Engine,
    out: str | os.PathLike[str],
    active: Sequence[str] = (),
    card: str | None = None,
    repo_id: str | None = None,
) -> Path:
    """Writes an open model as a hooked folder with a model card. Settings that name a path on this machine are left out.

    Args:
        engine: The open model; weights that were set are written as they are now.
        out: The folder to make: absent, or empty.
        active: What is active in a run and is no part of the file: edits and hooks, named for an error.
        card: The card's text; None for one that says what the model is.
        repo_id: The repository on the hub that the folder is for, if it is for one: the card says how to open it there.

    Returns:
        The folder.

    Raises:
        InputError: Something is active that the file would not hold.
        ExportError: The folder is not empty or cannot be written.
        ModelFileError: The model's files were replaced since it was opened.
    """
    from graphlens import surgery
    from graphlens.surgery.graph import write_manifest

    if active:
        raise InputError(
            f"{active[0]} is active, and a hooked folder holds the plain model: save it outside of the block, or write the "
            "interventions into a file with bake."
        )
    refuse_occupied(user_path(out))
    with as_file(engine, out) as path, new_folder(out) as stage:
        model = surgery.load(path)
        manifest = surgery.read_manifest(model)
        name = public_name(manifest.config.model_name)
        if name != manifest.config.model_name:  # of a file that was adopted with a config that names a path
            manifest = replace(manifest, config=replace(manifest.config, model_name=name))
            write_manifest(model, manifest)
        surgery.save(model, stage)
        copy_settings(engine.folder, stage)
        for file in SETTINGS:
            if file.endswith(".json") and (stage / file).is_file():
                remove_private_paths(stage / file)
        text = card_of(manifest, repo_id) if card is None else card
        (stage / CARD).write_text(text, encoding="utf-8")
    return user_path(out)


def push_hooked(
    engine: Engine,
    repo_id: str,
    active: Sequence[str] = (),
    *,
    card: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Writes an open model to a repository on the hub, which is made where there is none.

    Args:
        engine: The open model.
        repo_id: The repository: "user/name".
        active: See ``save_hooked``.
        card: See ``save_hooked``.
        private: True makes a new repository private, None does what the account's settings say.
        token: The hub's access token, or True for the one of the last login.
        commit_message: None for one that names graphlens.
        revision: The branch; None for the main one.
        create_pr: True opens a pull request instead of committing.

    Returns:
        The address of the commit.

    Raises:
        InputError: ``repo_id`` is no name of a repository, or something is active.
        ExportError: The hub refuses, or cannot be reached; nothing is committed then.
    """
    from huggingface_hub import HfApi, errors

    from graphlens.file.version import __version__

    message = f"Hooked model, written by graphlens {__version__}" if commit_message is None else commit_message
    with tempfile.TemporaryDirectory() as work:
        folder = save_hooked(engine, Path(work) / "model", active, card, repo_id)
        api = HfApi(token=token)
        try:
            made = api.create_repo(repo_id, private=private, exist_ok=True)
            found = api.upload_folder(
                repo_id=made.repo_id,
                folder_path=folder,
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
            )
        except errors.HFValidationError as error:
            raise InputError(
                f"{repo_id!r:.200} is no name of a repository on the hub: 'user/name' ({error})."
            ) from error
        except (errors.HfHubHTTPError, OSError) as error:
            raise ExportError(
                f"{repo_id}: the hub did not take the model ({error}). Log in (hf auth login) with a token that may write, and "
                "try again; save_pretrained writes the same folder here."
            ) from error
    return str(found.commit_url)


def card_of(manifest: Manifest, repo_id: str | None = None) -> str:
    """The model card of a hooked folder, in Markdown: what it is, how it is opened, and what it was made of.

    Args:
        manifest: What the folder says about itself.
        repo_id: The repository on the hub that it is in; None for a folder.
    """
    config, adopted = manifest.config, manifest.adopted
    kind = "vision model" if config.is_vision else "encoder" if config.is_encoder else "decoder"
    versions = ", ".join(f"{_plain(name)} {_plain(version)}" for name, version in manifest.exporter.items())
    rows = [
        ("architecture", f"{_plain(config.original_architecture)}, a {kind}"),
        ("layers, heads, d_model", f"{config.n_layers}, {config.n_heads}, {config.d_model}"),
        ("hook points", f"{len(manifest.hooks):,}"),
        ("weight processing", ", ".join(map(_plain, manifest.processing)) or "none"),
        (
            "made of",
            _plain(manifest.source) + ("" if manifest.revision is None else f" at {_plain(manifest.revision)}"),
        ),
        *(
            []
            if adopted is None
            else [("adopted from", f"{_plain(adopted.file)}, written by {_plain(adopted.producer)}")]
        ),
        ("written by", versions or "graphlens"),
    ]
    place = json.dumps("PATH/TO/THIS/FOLDER" if repo_id is None or kind != "decoder" else repo_id)
    opened = "from_onnx" if repo_id is None or kind != "decoder" else "from_pretrained_no_processing"
    hooks = [name for name in manifest.hooks if name.startswith("blocks.0.")] or list(manifest.hooks)
    return "\n".join(
        [
            *_front_matter(manifest, kind),
            f"# {_plain(config.model_name)}, with hook points",
            "",
            "An ONNX file whose internal activations have names: every hook point of TransformerLens is an output of the graph, "
            "to read and to edit. It is plain ONNX, and any ONNX Runtime opens it.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            "```python",
            f"from graphlens import {_CLASSES[kind]}",
            "",
            f"model = {_CLASSES[kind]}.{opened}({place})",
            "print(model.hook_points())",
            "```",
            "",
            f"The hook points of a block, by the example of the first: {', '.join(f'`{_plain(name)}`' for name in hooks)}.",
            "",
            "The licence of the weights is that of the model that they are of.",
            "",
        ]
    )


def _front_matter(manifest: Manifest, kind: str) -> list[str]:
    """What the hub reads of a card: YAML, of which JSON is a part."""
    tags = ["onnx", "onnxruntime", "graphlens", "interpretability", "mechanistic-interpretability"]
    data: dict[str, object] = {"library_name": "graphlens", "pipeline_tag": _TASKS[kind], "tags": tags}
    if manifest.revision is not None:  # it came from the hub: source is a repository
        data["base_model"] = manifest.source
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in data.items()), "---", ""]


def _plain(text: str) -> str:
    """Text from a file as Markdown shows it, and nothing else: no HTML, no table cells, no links."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    kept = "".join(c if c.isprintable() else " " for c in escaped)
    return "".join(f"\\{c}" if c in "\\`*|[]!" else c for c in kept)
