"""``graphlens drift``: how far a model's activations are from another's, and which step costs the accuracy."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from graphlens.cli.options import (
    Bos,
    Json,
    Provider,
    Strict,
    ensure_writable,
    flag,
    is_hooked,
    open_model,
    place_of,
    print_json,
    read_text,
    say,
)
from graphlens.cli.token_text import answer_of
from graphlens.errors import InputError
from graphlens.file.folder import user_path

if TYPE_CHECKING:
    from graphlens.analysis.arrays import Array
    from graphlens.analysis.drift_result import DriftResult
    from graphlens.analysis.metric import Metric
    from graphlens.model.hooked_encoder import HookedEncoder
    from graphlens.model.hooked_transformer import HookedTransformer

    Opened: TypeAlias = "HookedTransformer | HookedEncoder"

SHOWN = 15  # sites in the table
_EXCLUDED = 3  # sites whose nodes are printed
_NAMES = 6  # hook points of a list of those that one model lacks
_ROW = re.compile(r"\d+(?:[\s,]+\d+)*")


def drift(
    reference: Annotated[
        str,
        typer.Argument(metavar="FLOAT", help="The model that counts as right: a hooked folder, or as MODEL elsewhere."),
    ],
    other: Annotated[
        str, typer.Argument(metavar="OTHER", help="The model that is compared with it: the int8 file, say.")
    ],
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="Texts to run, read by FLOAT's tokenizer.")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens",
            metavar="FILE",
            help="A file of token ids in place of texts: .npy, .json, or text with a prompt on each line.",
        ),
    ] = None,
    patch: Annotated[
        bool,
        flag("--patch", help="Put FLOAT's activation into OTHER's run, site by site: what each one costs."),
    ] = False,
    top: Annotated[
        int | None,
        typer.Option(
            "--top", metavar="N", min=1, help=f"How many sites to show ({SHOWN}), and with --patch to try (all)."
        ),
    ] = None,
    answer: Annotated[
        str | None,
        typer.Option("--answer", metavar="TOKEN", help="With --patch: also how this token's probability recovers."),
    ] = None,
    wrong: Annotated[
        str | None,
        typer.Option("--wrong", metavar="TOKEN", help="With --answer: the logit difference to this token instead."),
    ] = None,
    out: Annotated[
        str | None, typer.Option("-o", "--out", metavar="FILE", help="Also keep the result in this .json file.")
    ] = None,
    picture: Annotated[
        str | None,
        typer.Option(
            "--picture", metavar="FILE", help="Also write a heat map to this file: .png, .svg, .pdf, .html, .txt."
        ),
    ] = None,
    bos: Bos = None,
    strict: Strict = False,
    provider: Provider = None,
    as_json: Json = False,
) -> None:
    """Compare two versions of a model at every hook point: float and int8, say. The steps that add most error come first.

    "fresh" is the error that a step adds to what it was handed, "relative" all error so far. With --patch, "recovered" is how
    much of the logits' error goes away when the step has FLOAT's activation.

    Example: [bold]graphlens drift gpt2-hooked gpt2-int8-hooked "Ann and Bob met. Bob gave a book to" --patch --top 10[/]
    """
    from graphlens.experiments.drift import drift as measured
    from graphlens.views.heat_map import ensure_drawable

    if (tokens is None) == (not prompts):
        raise InputError(
            'give the texts to run, or --tokens with a file of ids: one of both. For example "Ann met Bob".'
        )
    if not patch and (answer or wrong):
        raise InputError("--answer and --wrong say what --patch measures: add --patch.")
    if wrong is not None and answer is None:
        raise InputError("--wrong needs --answer: the logit difference is between both.")
    if out is not None:
        ensure_writable(out, "the result")
    if picture is not None:
        ensure_drawable(ensure_writable(picture, "the heat map"))
    first, second = _open(reference, provider), _open(other, provider)
    ids, mask = _read(first, prompts or [], bos, strict) if tokens is None else _filled(first, _read_file(tokens))
    options = {} if mask is None else {"attention_mask": mask}
    metric = _metric(first, answer, wrong)
    result = measured(
        first, second, ids, patch=patch, top=top if patch else None, metric=metric, verbose=not as_json, **options
    )
    if out is not None:
        result.save(out)
    if picture is not None:
        result.plot(picture, "recovered" if patch else "fresh")
    if as_json:
        print_json(result.to_dict())
    else:
        _show(result, top or SHOWN)


def _open(name: str, provider: str | None) -> Opened:
    """A model, an encoder as what it is."""
    from graphlens.engine.engine import Engine
    from graphlens.model.hooked_encoder import HookedEncoder

    path = user_path(place_of(name))
    config = Engine(path, provider).manifest.config if is_hooked(path) else None
    if config is not None and config.is_vision:
        raise InputError(
            f"{name} is a vision model, and this command runs texts, not images: drift of the Python API takes those."
        )
    if config is not None and config.is_encoder:
        return HookedEncoder.from_onnx(path, provider)
    return open_model(name, provider)


def _read(model: Opened, prompts: Sequence[str], bos: bool | None, strict: bool) -> tuple[Array, Array | None]:
    """Texts as tokens [b, p], and which of them are real."""
    from graphlens.model.encoder_request import EncoderText
    from graphlens.model.hooked_transformer import HookedTransformer

    if isinstance(model, HookedTransformer):
        what = "the prompt" if len(prompts) == 1 else "a prompt"
        return _filled(model, [list(read_text(model, what, text, bos, strict).tokens[0]) for text in prompts])
    text = model.runner.text
    assert isinstance(text, EncoderText)
    ids, real = text.with_mask(list(prompts), truncate=not strict)
    return ids, real


def _read_file(name: str) -> list[list[int]]:
    """The rows of a file of token ids.

    Raises InputError for a file that is not there, and for one that holds something else.
    """
    import numpy as np

    path = user_path(name)
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
                raise InputError(
                    f"{path}: holds {array.dtype} {list(array.shape)}; token ids are whole numbers [b, p]."
                )
            return [[int(token) for token in row] for row in np.atleast_2d(array)]
        return _rows(path, path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such file. --tokens takes .npy, .json, or text with a prompt on each line."
        ) from error
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read as token ids ({error}).") from error


def _rows(path: Path, text: str) -> list[list[int]]:
    """The rows of ids in a file. Raises InputError for something else."""
    if path.suffix == ".json":
        data = json.loads(text)
        data = [data] if isinstance(data, list) and data and not isinstance(data[0], list) else data
        fits = isinstance(data, list) and all(
            isinstance(row, list) and all(type(i) is int for i in row) for row in data
        )
        if not fits or not data or not all(data):
            raise InputError(f"{path}: token ids in JSON are a list for each prompt: [[15496, 995], [40, 1101]].")
        return [list(row) for row in data]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    bad = next((line for line in lines if not _ROW.fullmatch(line)), None)
    if bad is not None or not lines:
        raise InputError(f"{path}: {bad!r:.60} is no line of token ids, with spaces or commas between them.")
    return [[int(part) for part in re.findall(r"\d+", line)] for line in lines]


def _filled(model: Opened, rows: Sequence[Sequence[int]]) -> tuple[Array, Array | None]:
    """Rows as one array, and which of its tokens are real, None where all are.

    Shorter rows are filled up on the left, so that each one's last token comes last; an encoder's on the right, since in some
    padding counts as positions.
    """
    import numpy as np

    encoder, tokenizer = model.runner.config.is_encoder, model.runner.text.tokenizer
    pad = 0 if tokenizer is None or tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max(map(len, rows))
    ids, real = np.full((len(rows), longest), pad, np.int64), np.zeros((len(rows), longest), np.int64)
    for at, row in enumerate(rows):
        place = slice(0, len(row)) if encoder else slice(longest - len(row), None)
        ids[at, place], real[at, place] = row, 1
    return ids, None if real.all() else real


def _metric(model: Opened, answer: str | None, wrong: str | None) -> Metric | None:
    """What is measured besides the logits' error."""
    from graphlens.analysis.metrics import LogitDiff, Probability
    from graphlens.model.hooked_transformer import HookedTransformer

    if answer is None:
        return None
    if not isinstance(model, HookedTransformer):
        raise InputError("--answer measures the next token, which an encoder does not predict. Leave it out.")
    right = answer_of(model, "--answer", answer)
    return Probability(right) if wrong is None else LogitDiff(right, answer_of(model, "--wrong", wrong))


def _show(result: DriftResult, rows: int) -> None:
    """Prints a result for people."""
    from rich.console import Console

    from graphlens.analysis.drift_figures import signal_to_noise

    console = Console()
    batch, length = result.shape
    what = "the logits are" if result.end == "logits" else f"{result.end} is"
    console.print(
        f"{result.other} against {result.reference}, {batch} x {length} tokens: {what} off by "
        f"{100 * result.logits:.2g} % (signal-to-noise {signal_to_noise(result.logits):.1f} dB)",
        highlight=False,
        markup=False,
    )
    outputs = [f"{site.relative:.2g}" for site in result.sites if site.role == "hook_resid_post"]
    if outputs:
        console.print(f"relative error after each block: {' '.join(outputs)}", highlight=False, markup=False)
    if result.metric is not None:
        name, right, wrong = result.metric
        console.print(f"{name}: {right:.4g} in FLOAT, {wrong:.4g} in OTHER", highlight=False, markup=False)
    console.print(result.table(rows))
    named = [site for site in result.worst(rows) if site.nodes and site.fresh][:_EXCLUDED]
    if named:
        console.print("To leave a site's nodes as they were, tell the quantiser:")
    for site in named:
        line = f"  {site.hook}: nodes_to_exclude={list(site.nodes)}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for whose, names in (("FLOAT", result.only_reference), ("OTHER", result.only_other)):
        if names:
            more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
            say(f"{whose} alone has {', '.join(names[:_NAMES])}{more}: not compared.")
    for note in result.notes:
        say(f"Note: {note}")
