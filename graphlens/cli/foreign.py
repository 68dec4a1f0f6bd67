"""Commands for ONNX files that other programs exported, as they are: inspect, expose."""

from __future__ import annotations

from typing import Annotated

import typer

from graphlens.cli.options import Foreign, Json, Link, flag, place_of, print_json
from graphlens.cli.words import in_words_of_commands
from graphlens.errors import InputError


def expose(
    model: Foreign,
    like: Annotated[
        list[str] | None,
        typer.Option(
            "--like", metavar="PATTERN", help="Values, as names or shell patterns; may be given several times."
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("-o", "--out", metavar="FILE", help="The .onnx file to write, or a folder for model.onnx."),
    ] = None,
    show: Annotated[bool, flag("--list", help="Print which values match, and write nothing.")] = False,
    link: Link = False,
    as_json: Json = False,
) -> None:
    """Write a copy of any ONNX model that returns values of its graph besides its own outputs.

    Example: [bold]graphlens expose model.onnx --like "*Softmax_output_0" -o exposed.onnx[/]
    """
    from graphlens.pipelines.expose import expose as write
    from graphlens.pipelines.expose import list_values

    if show:
        values = list_values(place_of(model), like or "*")
        if as_json:
            print_json([vars(value) for value in values])
            return
        width = max(len(value.operator) for value in values)
        for value in values:
            end = "  (an output already)" if value.is_output else ""
            typer.echo(f"{value.operator:<{width}}  {value.name}  {value.type}{end}".rstrip())
        return
    if not like:
        raise InputError("--like is missing: name the values to expose. --list shows all there are.")
    if out is None:
        raise InputError("-o is missing: where the copy goes. --list shows what matches, and writes nothing.")
    made = write(place_of(model), like, out, link=link)
    if as_json:
        print_json({**vars(made), "file": str(made.file)})
        return
    before = f", {len(made.already):,} were outputs already" if made.already else ""
    typer.echo(f"Wrote {made.file}: {len(made.added):,} more outputs{before}")
    if made.unranked:
        typer.echo(
            f"The number of axes of {len(made.unranked):,} is not known before a run ({made.unranked[0]!r} first): ONNX Runtime "
            "takes the file, and onnx.checker wants one stated."
        )


def inspect(model: Foreign, as_json: Json = False) -> None:
    """Say what an ONNX file is, whoever made it: what is in it, how it is quantised, and what adopt would find.

    Example: [bold]graphlens inspect model.onnx[/]
    """
    from graphlens.pipelines.inspect import inspect_file

    found = inspect_file(place_of(model))
    if as_json:
        print_json(found.to_json())
    else:
        typer.echo(in_words_of_commands("\n".join(found.lines())))
