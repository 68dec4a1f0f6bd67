"""Commands that make a hooked model into files for other programs: bake, drivable, strip; check and seal, for such files."""

from __future__ import annotations

from typing import Annotated

import typer

from graphlens.cli.options import (
    Hooked,
    KeepHooks,
    Layout,
    Link,
    Out,
    SelfContained,
    WithPast,
    ensure_new_folder,
    flag,
    place_of,
    print_json,
)
from graphlens.cli.saes import ErrorTerm, Saes, spliced
from graphlens.errors import InputError


def bake(
    model: Hooked,
    edits: Annotated[
        str,
        typer.Argument(
            metavar="EDITS",
            help="Interventions as JSON, as docs/edits.md describes it; arrays in a .safetensors beside it.",
        ),
    ],
    out: Out,
    with_past: WithPast = False,
    keep_hooks: KeepHooks = False,
    self_contained: SelfContained = False,
    layout: Layout = "plain",
    link: Link = False,
    sae: Saes = None,
    error_term: ErrorTerm = False,
) -> None:
    """Write a model with interventions inside: a plain ONNX file that any ONNX Runtime runs.

    Example: [bold]graphlens bake tiny-gpt2 edits.json -o edited[/]
    """
    from graphlens.edits.files import load
    from graphlens.pipelines.deploy import bake_model

    ensure_new_folder(out)
    folder = bake_model(
        place_of(model),
        load(edits),
        out,
        with_past=with_past,
        keep_hooks=keep_hooks,
        self_contained=self_contained,
        layout=layout,
        saes=spliced(sae, error_term),
        link=link,
        announce=typer.echo,
    )
    typer.echo(f"Wrote {folder}")


def edits_schema() -> None:
    """Print the JSON Schema of the edits that bake takes, for editors and other programs.

    Example: [bold]graphlens edits-schema > edits.schema.json[/]
    """
    from graphlens.edits.schema import schema

    print_json(schema())


def drivable(
    model: Hooked,
    gates: Annotated[
        list[str],
        typer.Option(
            "--gates", metavar="PATTERN", help="Hook points, as names or shell patterns; may be given several times."
        ),
    ],
    out: Out,
    kinds: Annotated[
        str, typer.Option("--kinds", metavar="KINDS", help="Which changes: scale, add, patch; with commas.")
    ] = "scale,add,patch",
    required_gates: Annotated[
        bool, flag("--required-gates", help="Without defaults: JavaScript can't feed optional inputs.")
    ] = False,
    with_past: WithPast = False,
    keep_hooks: KeepHooks = False,
    self_contained: SelfContained = False,
    link: Link = False,
    sae: Saes = None,
    error_term: ErrorTerm = False,
) -> None:
    """Write a model whose hook points can be changed through inputs, from any ONNX Runtime language.

    Example: [bold]graphlens drivable tiny-gpt2 --gates "blocks.*.attn.hook_z" -o drivable[/]
    """
    from graphlens.pipelines.deploy import write_drivable

    ensure_new_folder(out)
    names = write_drivable(
        place_of(model),
        gates,
        out,
        kinds=[kind.strip() for kind in kinds.split(",")],
        required=required_gates,
        with_past=with_past,
        keep_hooks=keep_hooks,
        self_contained=self_contained,
        saes=spliced(sae, error_term),
        link=link,
        announce=typer.echo,
    )
    typer.echo(f"Wrote {out}: {len(names)} gates, the inputs <hook>/" + ", <hook>/".join(_parts(kinds)))


def _parts(kinds: str) -> list[str]:
    """The parts of the inputs of some kinds of change, which are separated by commas."""
    from graphlens.edits.parts import PARTS

    return [part for kind in kinds.split(",") for part in PARTS[kind.strip()].inputs]


def strip(model: Hooked, out: Out, self_contained: SelfContained = False, link: Link = False) -> None:
    """Write the plain model of a hooked or drivable file: no hook points as outputs, no gates.

    Example: [bold]graphlens strip drivable -o plain[/]
    """
    from graphlens.pipelines.deploy import write_stripped

    ensure_new_folder(out)
    folder = write_stripped(place_of(model), out, self_contained=self_contained, link=link, announce=typer.echo)
    typer.echo(f"Wrote {folder}")


def check(
    model: Hooked,
    run: Annotated[
        bool, flag("--run", help="Also open it in ONNX Runtime and run it once, in a process with limits.")
    ] = False,
    full: Annotated[bool, flag("--full", help="Also read the weights packed in the cache, every byte.")] = False,
    memory: Annotated[
        float | None,
        typer.Option(
            "--memory",
            metavar="GB",
            min=0.25,
            max=1e6,
            help="With --run: gigabytes that it may take; default: by its weights.",
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=1, max=1e6, help="With --run: how long it may take.")
    ] = 120,
) -> None:
    """Check a file from a stranger: its graph, every byte of its weights, its tokenizer; and say what was checked.

    Example: [bold]graphlens check tiny-gpt2 --run[/]
    """
    from graphlens.pipelines.check import check_folder

    found = check_folder(place_of(model), run, None if memory is None else int(memory * 1e9), seconds, full)
    typer.echo("\n".join(found.lines()))


def seal(model: Hooked) -> None:
    """Check a hooked file that you changed with another program, and record its digest, so that it opens.

    The seal tells damage from what was written. It is no signature: whoever changes a file can seal it anew.

    Example: [bold]graphlens seal gpt2-hooked[/]
    """
    from graphlens.surgery import seal as seal_file

    if place_of(model) != model:
        raise InputError(
            f"{model} ships with graphlens, sealed, and stays as it is. Copy its folder, and seal the copy."
        )
    report = seal_file(model)
    typer.echo(
        f"Sealed {model}: {report.nodes:,} nodes; every byte of {', '.join(report.external_files)} is as recorded."
    )
