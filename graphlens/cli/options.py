"""What the commands share: arguments and options, opening a model, printing JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphlens.cli.token_text import tokens_of
from graphlens.errors import InputError
from graphlens.file.folder import MODEL_FILE, user_path

if TYPE_CHECKING:
    from graphlens.analysis.arrays import Array
    from graphlens.model.hooked_transformer import HookedTransformer

Model = Annotated[str, typer.Argument(help="A hooked folder or model.onnx, a checkpoint folder, or a hub name.")]
Prompt = Annotated[str, typer.Argument(help="The text to run; token ids for a model without tokenizer: '0 5 6 7'.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Provider = Annotated[str | None, typer.Option("--provider", help="'cpu' or 'cuda'; default: CUDA where it works.")]
# Paths are text here: pathlib makes an empty one the working folder, and user_path refuses it.
Out = Annotated[str, typer.Option("-o", "--out", help="The folder to write.")]
Hooked = Annotated[str, typer.Argument(help="A hooked folder or model.onnx.")]
Foreign = Annotated[str, typer.Argument(help="An ONNX file that any program wrote, or a folder with one.")]
WithPast = Annotated[bool, typer.Option("--with-past", help="Inputs and outputs for a KV cache.")]
KeepHooks = Annotated[bool, typer.Option("--keep-hooks", help="Keep the hook points as outputs.")]
SelfContained = Annotated[
    bool, typer.Option("--self-contained", help="Copy the weights: what is done anyway, without --link.")
]
Link = Annotated[
    bool, typer.Option("--link", help="Hardlink the weights instead of copying them. onnx.load refuses such a folder.")
]
Layout = Annotated[str, typer.Option("--layout", help="'plain' or 'transformersjs'.")]
Bos = Annotated[
    bool | None, typer.Option("--bos/--no-bos", help="Prepend the BOS token, or do not; default: what the model does.")
]
Strict = Annotated[bool, typer.Option("--strict", help="A text too long for the model is an error, and not cut.")]


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

    path = user_path(model)
    if is_hooked(path):
        return HookedTransformer.from_onnx(path, provider)
    return HookedTransformer.from_pretrained_no_processing(model, providers=provider)


@dataclass(frozen=True)
class Read:
    """A text that a command was given, as the tokens that it runs.

    Attributes:
        tokens: int64 [1, p], at most n_ctx.
        length: The number of tokens of the whole text.
    """

    tokens: Array
    length: int

    @property
    def is_cut(self) -> bool:
        """True if these are not all tokens of the text."""
        return int(self.tokens.shape[1]) < self.length

    @property
    def used(self) -> str:
        """Which tokens of the text these are, for people: "15 tokens", or "the first 128 of 300 tokens"."""
        count = self.tokens.shape[1]
        return f"the first {count} of {self.length} tokens" if self.is_cut else f"{count} tokens"


def read_text(model: HookedTransformer, what: str, text: str, bos: bool | None, strict: bool) -> Read:
    """A text as tokens; one longer than the model takes is cut at its end, with a warning on stderr.

    Args:
        model: The model.
        what: How a message calls the text: "the prompt", "--clean".
        text: The text.
        bos: Whether it gets a BOS token; None for what the model does.
        strict: True makes a text too long an error.

    Raises:
        InputError: For no text, for one too long where ``strict`` says so, and for one that spells no ids where the model has no
            tokenizer.
    """
    cfg, tokens = model.cfg, tokens_of(model, what, text, bos)
    length = tokens.shape[1]
    if length > cfg.n_ctx:
        said = f"{what} has {length} tokens, and {cfg.model_name} takes at most {cfg.n_ctx} (n_ctx)"
        if cfg.n_ctx_trained is not None and cfg.n_ctx_trained > cfg.n_ctx:
            said = f"{said}; graphlens export --n-ctx allows up to {cfg.n_ctx_trained}"
        if strict:
            raise InputError(f"{said}. Shorten it, or leave out --strict, which would cut it.")
        say(f"Warning: {said}: the last {length - cfg.n_ctx} were cut. --strict makes this an error.")
    return Read(tokens[:, : cfg.n_ctx], length)


def say(line: str) -> None:
    """Prints a line for people on stderr."""
    typer.echo(line, err=True)


def print_json(data: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Prints JSON for programs, with escapes where stdout cannot hold every character."""
    unicode = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")  # a closed stdout is None
    try:
        text = json.dumps(data, ensure_ascii=not unicode, indent=2)
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, from an argument that was not UTF-8
        text = json.dumps(data, indent=2)
    typer.echo(text)
