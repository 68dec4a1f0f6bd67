"""What the commands share: arguments and options, opening a model, printing JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.models import OptionInfo

from graphlens.cli.token_text import tokens_of
from graphlens.errors import InputError
from graphlens.file.folder import MODEL_FILE, refuse_occupied, user_path

if TYPE_CHECKING:
    from graphlens.analysis.arrays import Array
    from graphlens.file.tokenizer import Tokenizer as LoadedTokenizer
    from graphlens.model.hooked_encoder import HookedEncoder
    from graphlens.model.hooked_transformer import HookedTransformer

    Reads = TypeVar("Reads", HookedTransformer, HookedEncoder, HookedTransformer | HookedEncoder)


def flag(*names: str, help: str) -> OptionInfo:
    """An option that is given or not: the help shows no type for it.

    Args:
        names: What one types; both names of one that can also be taken back.
        help: What it does.
    """
    made: OptionInfo = typer.Option(*names, metavar="", help=help)
    return made


_ANY = "tiny-gpt2, tiny-llama (both ship with graphlens), a hooked folder or its model.onnx"
Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"{_ANY}, a checkpoint folder, or a hub name.")]
Hooked = Annotated[str, typer.Argument(metavar="MODEL", help=f"{_ANY}.")]
Foreign = Annotated[
    str, typer.Argument(metavar="FILE", help="An ONNX file that any program wrote, a folder with one, or tiny-gpt2.")
]
Prompt = Annotated[
    str,
    typer.Argument(metavar="PROMPT", help="The text to run; for a model without tokenizer, or with --ids: '0 5 6 7'."),
]
Json = Annotated[bool, flag("--json", help="Print JSON instead of tables.")]
Provider = Annotated[
    str | None, typer.Option("--provider", metavar="cpu|cuda", help="Where to run; default: CUDA where it works.")
]
Ids = Annotated[bool, flag("--ids", help="Prompts and answers are token ids, not text: '0 5 6 7'.")]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="FOLDER",
        help="Take the tokenizer of this folder or hub name: for a model that has none, say.",
    ),
]
# Paths are text here: pathlib makes an empty one the working folder, and user_path refuses it.
Out = Annotated[str, typer.Option("-o", "--out", metavar="FOLDER", help="The folder to write: absent, or empty.")]
Results = Annotated[str, typer.Option("-o", "--out", metavar="FOLDER", help="The folder for the results.")]
WithPast = Annotated[bool, flag("--with-past", help="Inputs and outputs for a KV cache.")]
KeepHooks = Annotated[bool, flag("--keep-hooks", help="Keep the hook points as outputs.")]
SelfContained = Annotated[bool, flag("--self-contained", help="Copy the weights: what is done anyway, without --link.")]
Link = Annotated[
    bool, flag("--link", help="Hardlink the weights instead of copying them. onnx.load refuses such a folder.")
]
Layout = Annotated[
    str, typer.Option("--layout", metavar="plain|transformersjs", help="How files and weights lie in the folder.")
]
Bos = Annotated[
    bool | None, flag("--bos/--no-bos", help="Prepend the BOS token, or do not; default: what the model does.")
]
Strict = Annotated[bool, flag("--strict", help="A text too long for the model is an error, and not cut.")]


def is_hooked(path: Path) -> bool:
    """True for a hooked folder and for a file."""
    return path.is_file() or (path / MODEL_FILE).is_file()


def place_of(model: str) -> str:
    """Where a model's files are: the folder of an embedded model by its name, any other path as it is.

    A folder that is there wins over an embedded model of the same name.

    Args:
        model: What a command was given.
    """
    from graphlens.pipelines.hub import EMBEDDED, embedded_model

    return str(embedded_model(model)) if model in EMBEDDED and not user_path(model).exists() else model


def open_model(model: str, provider: str | None = None, tokenizer: str | None = None) -> HookedTransformer:
    """Opens a model with unprocessed weights.

    Args:
        model: A hooked folder or file, a checkpoint folder, a hub name, or an embedded model's name.
        provider: "cpu" or "cuda"; None takes CUDA where it works.
        tokenizer: A folder or hub name whose tokenizer is taken in place of the model's own.

    Raises:
        InputError: There is no tokenizer there, or one of more tokens than the model has.
    """
    from graphlens.model.hooked_transformer import HookedTransformer

    other = tokenizer_of(tokenizer)
    path = user_path(place_of(model))
    if is_hooked(path):
        opened = HookedTransformer.from_onnx(path, provider)
    else:
        opened = HookedTransformer.from_pretrained_no_processing(model, providers=provider)
    return with_tokenizer(opened, other, tokenizer)


def with_tokenizer(opened: Reads, other: LoadedTokenizer | None, name: str | None) -> Reads:
    """A model, with another tokenizer where one is given.

    Args:
        opened: The model.
        other: The tokenizer, or None.
        name: Where it comes from.

    Raises:
        InputError: It has more tokens than the model.
    """
    if other is not None:
        if len(other) > opened.cfg.d_vocab:
            raise InputError(
                f"the tokenizer of {name} has {len(other):,} tokens, and {opened.cfg.model_name} "
                f"{opened.cfg.d_vocab:,}: it is another model's."
            )
        opened.set_tokenizer(other)
    return opened


def tokenizer_of(name: str | None) -> LoadedTokenizer | None:
    """The tokenizer of a folder or hub name, None for None.

    Args:
        name: The folder or name.

    Raises:
        InputError: There is none.
    """
    from graphlens.file.tokenizer import load_tokenizer
    from graphlens.pipelines.hub import tokenizer_folder

    if name is None:
        return None
    found = load_tokenizer(tokenizer_folder(name))
    if found is None:
        raise InputError(f"--tokenizer {name}: there is no tokenizer.json there.")
    return found


def ensure_new_folder(out: str) -> None:
    """Makes sure, before work starts, that a folder can be made there. Raises ExportError where something is in the way."""
    refuse_occupied(user_path(out))


def ensure_writable(out: str, what: str) -> Path:
    """Makes sure, before work starts, that a file can be written.

    Args:
        out: The file, as it was given.
        what: What it is for, for the error: "the activations".

    Returns:
        Its path.

    Raises:
        InputError: It is a folder, or lies in none.
    """
    target = user_path(out)
    if target.is_dir():
        raise InputError(f"{target}: this is a folder, and {what} go into a file. Name one in it.")
    if not target.parent.is_dir():
        raise InputError(f"{target}: cannot be written (there is no folder {target.parent}). Make it first.")
    return target


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


def read_text(
    model: HookedTransformer | HookedEncoder, what: str, text: str, bos: bool | None, strict: bool, ids: bool = False
) -> Read:
    """A text as tokens; one longer than the model takes is cut at its end, with a warning on stderr.

    Args:
        model: The model.
        what: How a message calls the text: "the prompt", "--clean".
        text: The text.
        bos: Whether it gets a BOS token; None for what the model does.
        strict: True makes a text too long an error.
        ids: True reads it as token ids though there is a tokenizer.

    Raises:
        InputError: For no text, for one too long where ``strict`` says so, and for one that spells no ids where it must.
    """
    cfg, tokens = model.cfg, tokens_of(model, what, text, bos, ids)
    length = tokens.shape[1]
    if length > cfg.n_ctx:
        said = f"{what} has {length} tokens, and {cfg.model_name} takes at most {cfg.n_ctx} (n_ctx)"
        if cfg.n_ctx_trained is not None and cfg.n_ctx_trained > cfg.n_ctx:
            said = f"{said}; graphlens export --n-ctx allows up to {cfg.n_ctx_trained}"
        if strict:
            raise InputError(f"{said}. Shorten it, or leave out --strict, which would cut it.")
        say(f"Warning: {said}: the last {length - cfg.n_ctx} were cut. --strict makes this an error.")
        if (
            model.tokenizer is not None and not ids and model.runner.config.is_encoder
        ):  # whose special token at the end stays
            import numpy as np

            return Read(np.asarray([model.runner.text.cut(tokens[0].tolist(), False)]), length)
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
