"""``graphlens page``: a page in which a browser runs a model and edits it."""

from __future__ import annotations

from typing import Annotated

import typer

from graphlens.cli.options import Hooked, place_of
from graphlens.cli.saes import Saes, sae_of
from graphlens.errors import InputError


def page(
    model: Hooked,
    out: Annotated[
        str | None, typer.Option("-o", "--out", metavar="FOLDER", help="The folder to write: any web server serves it.")
    ] = None,
    single_file: Annotated[
        str | None,
        typer.Option(
            "--single-file", metavar="FILE", help="One HTML file instead, up to 100 MB: opens without a server."
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="The text that the page opens with.")
    ] = None,
    edits: Annotated[
        str | None,
        typer.Option("--edits", metavar="FILE", help="Interventions as JSON, in force when the page opens."),
    ] = None,
    sae: Saes = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime",
            metavar="FOLDER",
            help="A node_modules folder with the two npm packages that the page runs on; default: fetched once and kept.",
        ),
    ] = None,
) -> None:
    """Write a page in which a browser runs the model: switch heads off, patch, steer, and see the prediction change.

    Nothing that is typed there leaves the browser. The page takes edits from "graphlens bake", and gives them. With SAEs it shows
    the features at each token, and changes them.

    Example: [bold]graphlens page tiny-gpt2 -o site[/], then [bold]python -m http.server -d site[/]
    """
    from graphlens.edits.files import load
    from graphlens.pipelines.page import write_page, write_page_file

    if (out is None) == (single_file is None):
        raise InputError("say where the page goes: -o FOLDER, or --single-file FILE; one of both.")
    source = place_of(model)
    given = () if edits is None else load(edits)
    saes = [sae_of(each) for each in sae or ()]
    if out is not None:
        folder = write_page(source, out, edits=given, prompt=prompt, saes=saes, runtime=runtime, announce=typer.echo)
        typer.echo(f"Wrote {folder}. To look at it: python -m http.server -d {folder}, then open http://localhost:8000")
    elif single_file is not None:
        file = write_page_file(
            source, single_file, edits=given, prompt=prompt, saes=saes, runtime=runtime, announce=typer.echo
        )
        typer.echo(f"Wrote {file}. To look at it, open it in a browser.")
