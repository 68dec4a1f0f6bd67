"""The command adopt: a file that another program exported becomes a hooked folder."""

from __future__ import annotations

from typing import Annotated

import typer

from graphlens.cli.options import Json, flag, place_of, print_json
from graphlens.errors import InputError


def adopt(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="An ONNX file of a transformer, whoever exported it, or its folder.")
    ],
    out: Annotated[str | None, typer.Option("-o", "--out", metavar="FOLDER", help="The folder to write.")] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="FILE", help="The model's config.json; default: the one beside the file."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="FOLDER", help="A folder with the tokenizer; default: the file's own."),
    ] = None,
    dry_run: Annotated[bool, flag("--dry-run", help="Write nothing; print what would be found.")] = False,
    keep_fused: Annotated[
        bool, flag("--keep-fused", help="Leave fused operators as they are, and hook what is visible.")
    ] = False,
    force: Annotated[bool, flag("--force", help="Replace a hooked folder that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Find the hook points of an ONNX file that another program exported, and write it as a hooked folder.

    The original stays as it is. Its fused operators are expanded, its weights copied as they are (int8 stays int8). A hook
    point is named once it was seen to hold what its name says.

    Example: [bold]graphlens adopt model_int8.onnx -o hooked[/]
    """
    from graphlens.pipelines.adopt import adopt as adopted
    from graphlens.pipelines.adopt_report import report_data, report_lines
    from graphlens.views.progress import spinner

    if out is None and not dry_run:
        raise InputError("say where to write with -o FOLDER, or --dry-run to see what would be found.")
    with spinner(f"Adopting {file}"):
        report = adopted(
            place_of(file),
            out,
            config=config,
            tokenizer=tokenizer,
            dry_run=dry_run,
            keep_fused=keep_fused,
            force=force,
            announce=lambda _: None,
        )
    if as_json:
        print_json(report_data(report))
        return
    for line in report_lines(report):
        typer.echo(line)
