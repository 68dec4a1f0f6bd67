"""Commands for harvests: make one, and check one that is there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from graphlens.cli.options import Bos, Json, Model, Provider, Tokenizer, flag, open_model, print_json, say
from graphlens.errors import InputError, ModelFileError

if TYPE_CHECKING:
    from graphlens.analysis.harvest import Harvest
    from graphlens.analysis.reductions import Reduction


def harvest(
    model: Model,
    corpus: Annotated[
        list[str],
        typer.Argument(
            metavar="CORPUS...",
            help="Files: .txt (a document a line), .jsonl, .parquet, .npy with token ids; or a saved dataset's folder.",
        ),
    ],
    out: Annotated[
        str, typer.Option("-o", "--out", metavar="FOLDER", help="The folder to write, or a URL: s3://bucket/acts.")
    ],
    names: Annotated[
        list[str],
        typer.Option(
            "--names", metavar="PATTERN", help="Which hook points: names or shell patterns; may be given again."
        ),
    ],
    resume: Annotated[
        bool, flag("--resume", help="Go on with the harvest in FOLDER, and make damaged shards again.")
    ] = False,
    engine: Annotated[str, typer.Option("--engine", metavar="local|ray", help="What runs it.")] = "local",
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", min=1, help="With --engine ray: how many workers.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="float32|float16|bfloat16", help="What activations are written in.")
    ] = "float32",
    reduce: Annotated[
        list[str] | None,
        typer.Option(
            "--reduce",
            metavar="STATISTIC",
            help="Compute this and write no activations: mean, variance, covariance, quantiles, top, top:20; may be given again.",
        ),
    ] = None,
    keep: Annotated[bool, flag("--keep", help="Write activations beside what --reduce computes.")] = False,
    column: Annotated[
        str | None,
        typer.Option("--column", metavar="NAME", help="The column of texts or ids; default: text, input_ids, tokens."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", metavar="N", min=1, help="The most tokens of a row; default: the model's n_ctx."),
    ] = None,
    pack: Annotated[bool, flag("--pack", help="Fill rows with document after document.")] = False,
    too_long: Annotated[
        str, typer.Option("--too-long", metavar="split|cut|refuse", help="What happens to documents longer than a row.")
    ] = "split",
    bos: Bos = None,
    drop_bos: Annotated[bool, flag("--drop-bos", help="Drop the positions of BOS tokens.")] = False,
    keep_pad: Annotated[bool, flag("--keep-pad", help="Keep padding: each row gives N tokens.")] = False,
    last: Annotated[bool, flag("--last", help="Keep the last token of each document alone.")] = False,
    batch_tokens: Annotated[
        int, typer.Option("--batch-tokens", metavar="N", min=1, help="The most tokens of a run, padding included.")
    ] = 2048,
    shard_tokens: Annotated[
        int | None, typer.Option("--shard-tokens", metavar="N", min=1, help="The most tokens that are run for a shard.")
    ] = None,
    tokenizer: Tokenizer = None,
    provider: Provider = None,
    as_json: Json = False,
) -> None:
    """Write the activations of a corpus, or statistics of them, to a folder.

    Example: [bold]graphlens harvest tiny-gpt2 corpus.txt --names "*.hook_resid_post" --dtype float16 -o acts[/]
    """
    from graphlens.experiments.harvest import harvest as made
    from graphlens.file.remote import Url, url_of

    found = made(
        open_model(model, provider, tokenizer),
        corpus[0] if len(corpus) == 1 else [Url(file) if url_of(file) else Path(file) for file in corpus],
        names,
        out,
        engine=engine,
        workers=workers,
        resume=resume,
        dtype=dtype,
        reduce=[_statistic(word) for word in reduce or []],
        keep=True if keep else None,
        column=column,
        context=context,
        pack=pack,
        too_long=cast(Literal["split", "cut", "refuse"], too_long),
        prepend_bos=bos,
        keep_bos=not drop_bos,
        keep_pad=keep_pad,
        positions="last" if last else "all",
        batch_tokens=batch_tokens,
        shard_tokens=shard_tokens,
    )
    if as_json:
        print_json(_told(found))
        return
    what = f"{len(found.names)} hook points" if found.plan.written else f"statistics of {len(found.names)} hook points"
    typer.echo(
        f"{len(found):,} tokens, {what} -> {found.path} ({found.nbytes / 1e6:,.1f} MB, {len(found.plan.shards)} shards)"
    )


def _told(found: Harvest) -> dict[str, object]:
    """What JSON says of a harvest."""
    plan = found.plan
    return {
        "folder": str(found.path),
        "tokens": len(found),
        "documents": found.n_documents,
        "names": list(found.names),
        "shapes": {name: list(shape) for name, shape in plan.shapes.items()},
        "dtype": plan.dtype if plan.written else None,
        "statistics": [spec["kind"] for spec in plan.reductions],
        "shards": len(plan.shards),
    }


def _statistic(word: str) -> str | Reduction:
    """What ``--reduce`` asks for: a word, or top:20 and quantiles:0.5,0.9 with their option."""
    from graphlens.analysis.reductions import Quantiles, Top

    kind, _, option = word.partition(":")
    if not option:
        return word
    try:
        if kind == Top.kind:
            return Top(int(option))
        if kind == Quantiles.kind:
            return Quantiles(tuple(float(q) for q in option.split(",")))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"--reduce {word!r}: after the colon come numbers, as in top:20 and quantiles:0.5,0.9."
        ) from error
    raise InputError(f"--reduce {word!r}: only top and quantiles take a number.")


def harvest_check(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A harvest.")], as_json: Json = False
) -> None:
    """Read every byte of a harvest, and name what is not as it was written.

    Example: [bold]graphlens harvest-check acts[/]
    """
    from graphlens.analysis.harvest import Harvest as Opened

    found = Opened(folder)
    wrong = found.verify()
    if as_json:
        print_json({**_told(found), "damaged": wrong})
    for line in wrong if not as_json else ():
        say(line)
    if wrong:
        raise ModelFileError(
            f"{found.path}: {len(wrong)} of its files are not what was written. graphlens harvest --resume makes them again."
        )
    if not as_json:
        typer.echo(f"{found.path}: sound ({len(found):,} tokens, {len(found.plan.shards)} shards)")
