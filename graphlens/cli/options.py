"""What the commands share: arguments and options, opening a model, printing JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphlens.file.folder import MODEL_FILE

if TYPE_CHECKING:
    from graphlens.model.hooked_transformer import HookedTransformer

Model = Annotated[str, typer.Argument(help="A hooked folder or model.onnx, a checkpoint folder, or a hub name.")]
Prompt = Annotated[str, typer.Argument(help="The text to run.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Provider = Annotated[str | None, typer.Option("--provider", help="'cpu' or 'cuda'; default: CUDA where it works.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="The folder to write.")]
Hooked = Annotated[Path, typer.Argument(help="A hooked folder or model.onnx.")]
WithPast = Annotated[bool, typer.Option("--with-past", help="Inputs and outputs for a KV cache.")]
KeepHooks = Annotated[bool, typer.Option("--keep-hooks", help="Keep the hook points as outputs.")]
SelfContained = Annotated[bool, typer.Option("--self-contained", help="Copy the weights instead of hardlinking them.")]
Layout = Annotated[str, typer.Option("--layout", help="'plain' or 'transformersjs'.")]
NoBos = Annotated[bool, typer.Option("--no-bos", help="Do not prepend the BOS token.")]


def is_hooked(path: Path) -> bool:
    """True for a hooked folder and for a file."""
    return path.is_file() or (path / MODEL_FILE).is_file()


def open_model(model: str, provider: str | None = None) -> HookedTransformer:
    """Opens a model with unprocessed weights.

    Args:
        model: A hooked folder or file, a checkpoint folder, or a hub name.
        provider: "cpu" or "cuda"; None takes CUDA where it works.
    """
    from graphlens.model.hooked_transformer import HookedTransformer

    path = Path(model)
    if is_hooked(path):
        return HookedTransformer.from_onnx(path, provider)
    return HookedTransformer.from_pretrained_no_processing(model, providers=provider)


def print_json(data: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Prints JSON for programs."""
    typer.echo(json.dumps(data, ensure_ascii=False, indent=2))
